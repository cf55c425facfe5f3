"""Which solver, how many steps, which adjoint: measured on a model, and recommended in words."""

from cpmm_jax.solver_study.candidates import count_evaluations, default_candidates, describe
from cpmm_jax.solver_study.compare import compare_solvers
from cpmm_jax.solver_study.measurement import (
    Recommendation,
    SolverMeasurement,
    recommend_solver,
)

__all__ = [
    "Recommendation",
    "SolverMeasurement",
    "compare_solvers",
    "count_evaluations",
    "default_candidates",
    "describe",
    "recommend_solver",
]
