"""Density estimators compared on many data sets: every {data set x method x seed} is one cell.

    python -m experiments.compare --preset smoke
    python -m experiments.compare --preset main --data-dir DIR --jobs 2
    python -m experiments.compare --preset main --data-dir DIR --components 40 --rank 4

Gives the mean test log-likelihood in nats of the standardised data, with 95 % intervals over seeds,
and its difference to the best mixture with free parameters. The rules, the same for every method:
it sees training and validation rows only; its settings are chosen by the mean validation
log-likelihood among what it can try within the same number of seconds; what it returns was fitted
to the training rows alone (the CPMM's recipe would go on to fit again with the validation rows).
With `--components` and `--rank` all mixtures have that size, and only other settings are searched.
"""
