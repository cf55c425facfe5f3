"""Fitting a model to data by stochastic maximum likelihood."""
