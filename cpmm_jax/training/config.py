"""Settings of a training run, and the optimiser that they describe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cpmm_jax.dynamics.trajectory import StratifiedTimes
from cpmm_jax.errors import ConfigError

TimeSampler = Callable[[Array, int], Float[Array, " T"]]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `fit`.

    The constructor stores; `check` (called by `fit`) refuses what is out of range.

    Attributes:
        steps: training steps.
        batch_size: examples in a step (all of them where there are fewer).
        learning_rate: highest learning rate of Adam.
        warmup_steps: steps over which the learning rate rises to it, at most half of all steps.
        final_learning_rate: what is left at the end of the cosine decay, as a fraction.
        clip_norm: largest global norm of the gradient; None for no clipping.
        num_times: T, pseudotimes drawn in every step. Each step's mixture is a sample of the
            continuous one, whose log-likelihood is on average the higher (Jensen's inequality): a
            mixture extracted at more times is no worse, and few draws regularise.
        valid_times: grid points of the validation; None for `num_times`.
        time_sampler: how pseudotimes are drawn, `(key, num_times) -> (num_times,)`; hashable.
        discriminative: with labels, the share of log p(x) that is taken from the objective
            log p(x, y), in [0, 1]; at 1 it is log p(y | x), the objective of a classifier.
        report_every: steps between reports (validation, metrics, progress); all of them run in one
            call on the device.
        patience: reports without a better validation score before `fit` stops; None for never.
        valid_fraction: part of the training rows set aside where no `x_valid` is given (within
            each class where there are labels); 0 for none.
        max_refused: refused steps in a row that are borne; at one more, training returns to the
            last parameters that are known to be good, with half the learning rate.
        max_returns: such returns that are borne; one more ends the training.
        seed: seed of batches, pseudotimes and the validation part.

    Example:
        >>> TrainConfig(steps=10).check()
        >>> TrainConfig(steps=0).check()
        Traceback (most recent call last):
            ...
        cpmm_jax.errors.ConfigError: `steps` must be a whole number >= 1; got 0.
    """

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_learning_rate: float = 0.05
    clip_norm: float | None = 1.0
    num_times: int = 8
    valid_times: int | None = None
    time_sampler: TimeSampler = field(default_factory=StratifiedTimes)
    discriminative: float = 0.0
    report_every: int = 100
    patience: int | None = None
    valid_fraction: float = 0.1
    max_refused: int = 20
    max_returns: int = 3
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError if a setting is out of its range."""
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("patience", "valid_times"):
                continue
            if not _is_whole(value) or value < low:
                _refuse(name, f"a whole number >= {low}", value)
        if self.seed >= 2**32:
            _refuse("seed", "a whole number below 2**32", self.seed)
        _check_real("learning_rate", self.learning_rate, "a finite number > 0", lambda v: v > 0)
        _check_real(
            "final_learning_rate",
            self.final_learning_rate,
            "a fraction of `learning_rate` in [0, 1]",
            lambda v: 0 <= v <= 1,
        )
        _check_real(
            "valid_fraction", self.valid_fraction, "a fraction in [0, 1)", lambda v: 0 <= v < 1
        )
        _check_real(
            "discriminative", self.discriminative, "a share in [0, 1]", lambda v: 0 <= v <= 1
        )
        if self.clip_norm is not None:
            rule = "a finite number > 0, or None for no clipping"
            _check_real("clip_norm", self.clip_norm, rule, lambda v: v > 0)
        try:
            hash(self.time_sampler)
        except TypeError:
            _refuse("time_sampler", "hashable (a frozen dataclass, say)", self.time_sampler)
        if not callable(self.time_sampler):
            rule = "a sampler of pseudotimes, such as StratifiedTimes()"
            _refuse("time_sampler", rule, self.time_sampler)


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "num_times": 1,
    "valid_times": 1,
    "report_every": 1,
    "patience": 1,
    "max_refused": 0,
    "max_returns": 0,
    "seed": 0,
}


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_real(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and holds(value)):
        _refuse(name, rule, value)


def _refuse(name: str, rule: str, value: Any) -> None:
    raise ConfigError(f"`{name}` must be {rule}; got {value!r}.")


class Schedule(NamedTuple):
    """The learning rate by number of updates: a linear rise, then a cosine decay.

    Its numbers are arrays that the compiled step takes as arguments, so that another learning rate
    or number of steps compiles nothing anew.

    Attributes:
        peak: highest learning rate.
        warmup: updates over which it rises.
        begin: updates after which the decay begins.
        steps: updates after which it has decayed.
        final: what is left then, as a fraction of `peak`.
    """

    peak: Float[Array, ""]
    warmup: Float[Array, ""]
    begin: Float[Array, ""]
    steps: Float[Array, ""]
    final: Float[Array, ""]

    def __call__(self, updates: Int[Array, ""] | int) -> Float[Array, ""]:
        """Return the learning rate after so many updates."""
        done = jnp.asarray(updates, self.peak.dtype)
        rise = (done + 1) / (self.warmup + 1)  # from above zero: the first step does something
        progress = (done - self.begin) / jnp.maximum(self.steps - self.begin, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return self.peak * jnp.minimum(rise, self.final + (1 - self.final) * cosine)


def learning_rate_schedule(config: TrainConfig) -> Schedule:
    """Return the schedule that `config` describes."""
    warmup = min(config.warmup_steps, config.steps // 2)
    numbers = (config.learning_rate, warmup, warmup, config.steps, config.final_learning_rate)
    return Schedule(*(jnp.asarray(number, jnp.float32) for number in numbers))


def default_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return Adam's direction, the gradient clipped by its global norm; the step has the rate."""
    return _adam(None if config.clip_norm is None else float(config.clip_norm))


@lru_cache(maxsize=32)
def _adam(clip_norm: float | None) -> optax.GradientTransformation:
    # Cached, since a compiled training step is found again only by the identity of the optimiser's
    # functions: a second `fit` of the same kind then compiles nothing.
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    # Flattened: one vector in place of many leaves is less to compile and to call.
    return optax.flatten(optax.chain(clip, optax.scale_by_adam()))
