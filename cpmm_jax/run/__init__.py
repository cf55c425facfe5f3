"""The run folder: everything that one fit leaves, complete or not there at all.

config.json     what was fitted, on what, with which settings and versions (schema 1)
metrics.jsonl   one line per report of the training
metrics.json    the result on the test part
mixture.npz     the extracted mixture, which NumPy alone reads
checkpoints/    model/: the trained model with its field, in standardised units, to study it or to
                extract it anew (see `training.checkpoint`); flow/: that of the curriculum
figures/        what `cpmm plot` and `cpmm bench-solvers` draw

Until the fit is finished all of this is in the hidden folder .RUN.part beside it, together with

fit.json        what was asked for
checkpoints/training/   snapshots of the trainings under way (see `training.snapshots`)

from which `resume_run` goes on.
"""

from cpmm_jax.run.fitting import fit_run, resume_run
from cpmm_jax.run.reading import Examples, Run, Source, open_run, read_examples

__all__ = ["Examples", "Run", "Source", "fit_run", "open_run", "read_examples", "resume_run"]
