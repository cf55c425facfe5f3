"""EM for mixtures of factor analyzers: exact, in mini-batches, or over a stream of chunks.

The steps are in `mixture.em_steps`, the loops in `mixture.em_loops`. Examples are taken about their
mean, so that nothing depends on where the origin is.

Source: Ghahramani and Hinton, "The EM Algorithm for Mixtures of Factor Analyzers" (1996);
mini-batches: Cappe and Moulines, "On-line expectation-maximization algorithm for latent data
models" (2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture.checks import check_noise_floor, check_rows, check_weight
from cpmm_jax.mixture.em_loops import BLOCK_ROWS, EMResult, exact_em, stepwise_em, stream_em
from cpmm_jax.mixture.em_steps import Constraints
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.initialise import default_noise_floor, kmeans_start
from cpmm_jax.mixture.mfa import MFA, check_parameters
from cpmm_jax.mixture.moves import improve
from cpmm_jax.mixture.padding import pad_rows, padded_size_of_few

Start = Callable[..., MFA]
TURN = 5  # iterations between two looks at whose examples are whose, where labels are missing


def fit_em(
    x: Float[ArrayLike, "N D"],
    num_components: int | None = None,
    rank: int | None = None,
    *,
    start: Start | MFA = kmeans_start,
    n_init: int = 1,
    moves: int = 0,
    max_iter: int = 200,
    tol: float = 1e-4,
    noise_floor: Float[ArrayLike, "*D"] | None = None,
    constraints: Constraints = Constraints(),  # noqa: B008
    sample_weight: Float[ArrayLike, " N"] | None = None,
    chunk_size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> EMResult:
    """Fit a mixture of factor analyzers by EM.

    The likelihood never falls from one iteration to the next. A component that holds less than one
    example has died: it is set up anew at the example of lowest density, where that raises the
    likelihood.

    Args:
        x: examples, shape (N, D), finite.
        num_components: K; not needed where `start` is a mixture.
        rank: factors, R; not needed where `start` is a mixture.
        start: `kmeans_start`, `random_start`, a function of your own with their arguments, or a
            mixture to go on from.
        n_init: starts, of which the fit of highest likelihood is returned.
        moves: how many times, after that, to try to take the component that is missed least to
            where one component covers what two would describe better; kept where EM, going on from
            there, ends higher by `tol`. For mixtures that should not depend on the luck of a start.
        max_iter: most iterations (epochs, with `batch_size`).
        tol: gain of the mean log-likelihood, in nats, below which EM stops.
        noise_floor: smallest noise variance, a number or shape (D,): without one the likelihood is
            unbounded. None for `default_noise_floor`.
        constraints: what components have in common.
        sample_weight: how much each example counts, shape (N,), not negative; only ratios matter.
        chunk_size: examples in a block; the result does not depend on it but for rounding.
        batch_size: examples of a mini-batch, drawn anew in each epoch whatever the order of the
            rows, for stepwise EM; None for exact EM.
        seed: seed of starts and mini-batches.

    Returns:
        An `EMResult`.

    Raises:
        DataError: `x` or `sample_weight` has the wrong shape or is not finite, or there are fewer
            examples than components.
        ConfigError: a setting out of range.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(500, 2)) @ np.diag([1.0, 2.0])
        >>> result = fit_em(x, num_components=1, rank=1)
        >>> result.mixture.covariance().shape, result.converged
        ((2, 2), True)
    """
    given = start if isinstance(start, MFA) else None
    if given is not None:
        check_parameters(given)
        num_components, rank = given.num_components, given.rank
    rows = check_rows(x, num_components, rank)
    _check_settings(tol, max_iter, n_init=n_init, chunk_size=chunk_size, batch_size=batch_size)
    if moves < 0:
        raise ConfigError(f"`moves` must be at least 0, a number of tries; got {moves}.")
    weight = check_weight(sample_weight, len(rows))
    weight = np.ones(len(rows)) if weight is None else weight / weight[weight > 0].mean()
    centre = np.average(rows, axis=0, weights=weight)
    floor = default_noise_floor(rows) if noise_floor is None else noise_floor
    floor = check_noise_floor(floor, rows.shape[1])
    dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
    centred = np.subtract(rows, centre, dtype=rows.dtype).astype(dtype, copy=False)
    weight = weight.astype(dtype)
    if batch_size is None:
        size = padded_size_of_few(len(rows))
        centred, weight = pad_rows(centred, size), pad_rows(weight, size)  # of no weight
    data = jnp.asarray(centred), jnp.asarray(weight)
    settings: Any = {"constraints": constraints, "max_iter": max_iter}

    def run(start: MFA, i: int = 0) -> EMResult:
        begin = _above_floor(start, floor)
        if batch_size is None:
            size = min(chunk_size or BLOCK_ROWS, len(centred))
            return exact_em(*data, begin, floor, tol, size=size, **settings)
        key, size = jax.random.key(seed * n_init + i), min(batch_size, len(rows))
        return stepwise_em(*data, begin, floor, tol, key, size=size, **settings)

    best: EMResult | None = None
    for i in range(n_init if given is None else 1):
        begin = given
        if given is None:
            own = seed * n_init + i  # fits of other seeds share no start
            begin = start(rows, num_components, rank, noise_floor=floor, seed=own)  # type: ignore[operator]
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), begin)
        result = run(_moved(wide, -centre), i)
        if best is None or result.log_likelihood > best.log_likelihood:
            best = result
    assert best is not None
    if moves and best.mixture.num_components > 1:
        best = improve(run, best, *data, tol, tries=moves, seed=seed)
    return _returned(best, centre, dtype)


def _returned(result: EMResult, centre: npt.NDArray[Any], dtype: Any) -> EMResult:
    moved = _moved(result.mixture, centre)
    return result._replace(mixture=jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), moved))


def _moved(mixture: MFA, shift: npt.NDArray[Any]) -> MFA:
    return mixture.replace(means=mixture.means + shift)  # type: ignore[attr-defined, no-any-return]


def _above_floor(mixture: MFA, floor: npt.NDArray[Any]) -> MFA:
    noise = np.maximum(np.asarray(mixture.log_noise), np.log(floor))
    return mixture.replace(log_noise=noise)  # type: ignore[attr-defined, no-any-return]


def _check_settings(tol: float, max_iter: int, **counts: int | None) -> None:
    if max_iter < 0:
        raise ConfigError(f"`max_iter` must be at least 0; got {max_iter}.")
    if not tol >= 0:
        raise ConfigError(f"`tol` must be a gain in nats, at least 0; got {tol}.")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be at least 1; got {value}.")


def fit_em_stream(
    chunks: Callable[[], Iterable[Float[ArrayLike, "n D"]]],
    start: MFA,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    noise_floor: Float[ArrayLike, "*D"] | None = None,
    constraints: Constraints = Constraints(),  # noqa: B008
) -> EMResult:
    """Fit by exact EM to examples that come in chunks: data larger than the memory.

    Args:
        chunks: called once for each iteration; returns the chunks, arrays (n, D) of any n, the same
            each time in all. Slices of a `numpy.memmap` will do.
        start: where to begin, for instance a fit to some of the examples.
        max_iter: most iterations.
        tol: gain of the mean log-likelihood, in nats, below which EM stops.
        noise_floor: as for `fit_em`; None for 1e-4 of each feature's variance under `start`.
        constraints: what components have in common.

    Returns:
        An `EMResult`, equal to that of `fit_em` from the same start but for rounding.

    Raises:
        DataError: a chunk has the wrong shape or is not finite, or there is none.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(300, 2))
        >>> start = kmeans_start(x, 2, 1, seed=0)
        >>> fit_em_stream(lambda: (x[i : i + 100] for i in (0, 100, 200)), start).converged
        True
    """
    check_parameters(start)
    _check_settings(tol, max_iter)
    wide: MFA = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), start)
    centre, covariance = np.asarray(start.mean(), np.float64), np.asarray(start.covariance())
    floor = 1e-4 * np.diag(covariance) if noise_floor is None else noise_floor
    floor = check_noise_floor(floor, start.dim)
    longest = 1

    def centred() -> Iterator[tuple[Any, Any]]:
        nonlocal longest  # chunks are padded to one length: one compiled program
        for chunk in chunks():
            rows = check_rows(chunk, 1, start.rank)
            if rows.shape[1] != start.dim:
                raise DataError(
                    f"`chunks` must give arrays of shape (n, {start.dim}), the features of "
                    f"`start`; got {rows.shape}."
                )
            longest = max(longest, len(rows))
            padded = np.zeros((longest, start.dim), start.means.dtype)
            padded[: len(rows)] = rows - centre
            yield padded, (np.arange(longest) < len(rows)).astype(padded.dtype)

    begin = _above_floor(_moved(wide, -centre), floor)
    size = BLOCK_ROWS
    result = stream_em(
        centred, begin, floor, tol, constraints=constraints, max_iter=max_iter, size=size
    )
    return _returned(result, centre, start.means.dtype)


Mixture = TypeVar("Mixture", MFA, HierarchicalMFA)


def polish(
    mixture: Mixture,
    x: Float[ArrayLike, "N D"],
    y: Int[ArrayLike, " N"] | None = None,
    *,
    max_iter: int = 10,
    tol: float = 1e-4,
    sample_weight: Float[ArrayLike, " N"] | None = None,
) -> Mixture:
    """Improve a fitted mixture, an extracted CPMM say, by some iterations of EM.

    The likelihood of the examples given never falls, of p(x), or of p(x, y) where there are labels.
    No noise variance falls below the smallest of its feature in `mixture`.

    Args:
        mixture: where to begin.
        x: training examples, shape (N, D), in the units of `mixture`.
        y: class codes, shape (N,), -1 where not known, for a `HierarchicalMFA` whose classes are
            those of the labels: each is fitted to its own examples, and to the others by the
            probability that they are its. None to fit p(x).
        max_iter: most iterations.
        tol: gain in nats below which to stop.
        sample_weight: how much each example counts, shape (N,); only ratios matter.

    Returns:
        A mixture of the same shape.

    Raises:
        DataError: examples, labels or weights of the wrong shape.
        ConfigError: labels for a mixture without classes.
    """
    if isinstance(mixture, MFA):
        if y is not None:
            raise ConfigError("`y` must be None for an `MFA`, which has no classes; got labels.")
        return _polished(mixture, x, sample_weight, max_iter, tol)
    if y is None:
        flat = _polished(mixture.flatten(), x, sample_weight, max_iter, tol)
        by_class = flat.logits.reshape(mixture.num_classes, -1)
        components = jax.tree.map(lambda new, old: new.reshape(old.shape), flat, mixture.components)
        return HierarchicalMFA(jax.nn.logsumexp(by_class, axis=1), components)
    rows, labels = np.asarray(x), np.asarray(y)
    if labels.shape != rows.shape[:1] or labels.max() >= mixture.num_classes:
        raise DataError(
            f"`y` must be class codes below {mixture.num_classes}, shape ({len(rows)},); "
            f"got shape {labels.shape}, largest {labels.max()}."
        )
    weight = check_weight(sample_weight, len(rows))
    weight = np.ones(len(rows)) if weight is None else weight
    turn = max(1, max_iter) if labels.min() >= 0 else TURN
    for done in range(0, max_iter, turn):
        mixture = _polished_classes(mixture, rows, labels, weight, min(turn, max_iter - done), tol)
    return mixture


def _polished_classes(
    mixture: HierarchicalMFA,
    rows: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    weight: npt.NDArray[np.float64],
    max_iter: int,
    tol: float,
) -> HierarchicalMFA:
    """Polish every class on its share of the examples.

    With the shares held, the sum over classes of the share of log p(x, c) bounds the likelihood
    from below up to a constant, so that raising it raises the likelihood: a step of EM in which the
    classes are the hidden variables.
    """
    # A copy: of an array that is float64 already NumPy would give a view, which is read-only.
    shares: npt.NDArray[np.float64] = np.array(
        jax.nn.one_hot(labels, mixture.num_classes), np.float64
    )
    if labels.min() < 0:
        unknown = labels < 0
        shares[unknown] = np.asarray(mixture.predict_proba(rows))[unknown]
    shares *= weight[:, None]
    parts = []
    for c in range(mixture.num_classes):
        part = mixture.class_mixture(c)  # the rows of others weigh nothing: one compiled program
        own = shares[:, c]
        parts.append(_polished(part, rows, own, max_iter, tol) if own.any() else part)
    components = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    logits = jnp.log(jnp.maximum(jnp.asarray(shares.sum(axis=0) / weight.sum()), 1e-30))
    return HierarchicalMFA(logits.astype(components.means.dtype), components)


def _polished(mixture: MFA, x: Any, weight: Any, max_iter: int, tol: float) -> MFA:
    floor = np.exp(np.min(np.asarray(mixture.log_noise, np.float64), axis=0))
    result = fit_em(
        x, start=mixture, max_iter=max_iter, tol=tol, noise_floor=floor, sample_weight=weight
    )
    return result.mixture
