"""How a state moves along an ODE."""
