"""The mixture's log-density, forward and with its gradient, against the machine and against peers.

    .venv/bin/python -m benchmarks.density [--full]

The machine's own float32 matrix-product rate is the better one of two products: one of the shapes
of the density, (N, D) x (D, K (R + 2)), and a square one. The density counts 2 N K D (R + 2)
operations, the gradient with respect to all parameters three times as many. On an accelerator there
are larger sizes too, and the fraction of its bandwidth: the bytes that the examples and the
products of both passes take, over those that a copy moves in that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cpmm_jax as cpmm
from benchmarks.memory import peak_memory, show
from benchmarks.peers import find, missing
from benchmarks.report import Report, Table, main
from cpmm_jax import artifact
from cpmm_jax.solver_study.timing import interleave

COPY = "copy"
PARAMETERS = ("logits", "means", "loadings", "log_noise")
SQUARE = 2048  # side of the square product


class Size(NamedTuple):
    """Examples, components, features, factors."""

    N: int
    K: int
    D: int
    R: int

    def __str__(self) -> str:
        return f"N = {self.N}, K = {self.K}, D = {self.D}, R = {self.R}"

    @property
    def bytes_moved(self) -> int:
        """Bytes in float32 to read the examples, and to write and read the products once."""
        return 4 * (self.N * self.D + 2 * self.N * self.K * (self.R + 2))

    @property
    def operations(self) -> int:
        """Floating-point operations of the log-density, as counted here."""
        return 2 * self.N * self.K * self.D * (self.R + 2)


SHORT = (Size(4096, 80, 64, 4),)
FULL = (Size(4096, 80, 64, 4), Size(2048, 300, 784, 6), Size(1000, 100, 63, 6))
LARGE = (Size(2**18, 80, 64, 4), Size(2**15, 300, 784, 6))  # besides, on an accelerator
COPIED = 2**28  # numbers that are copied to know an accelerator's bandwidth
GRADIENT_TOLERANCE = 1e-2  # between methods in float32, relative


def draw(size: Size) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw a mixture and examples near it."""
    N, K, D, R = size
    rng = np.random.default_rng(0)
    mixture = {
        "logits": rng.normal(size=K),
        "means": rng.normal(size=(K, D)),
        "loadings": rng.normal(size=(K, D, R)) * np.sqrt(0.5 / R),
        "log_noise": np.log(rng.uniform(0.1, 1.0, size=(K, D))),
    }
    x = mixture["means"][rng.integers(K, size=N)] + rng.normal(size=(N, D))
    return {name: leaf.astype(np.float32) for name, leaf in mixture.items()}, x.astype(np.float32)


def ours(p: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return cpmm.MFA(**p).log_prob(x)


def plain(p: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A centred matrix-product form in a dozen lines, with nothing done for precision."""
    K, D, R = p["loadings"].shape
    centre = p["means"].mean(axis=0, keepdims=True)
    a, b, precision = x - centre, p["means"] - centre, jnp.exp(-p["log_noise"])
    scaled = p["loadings"] * precision[:, :, None]
    capacitance = jnp.eye(R)[None] + jnp.einsum("kdr,kds->krs", scaled, p["loadings"])
    factor = jnp.linalg.cholesky(capacitance)
    projection = jax.scipy.linalg.solve_triangular(factor, scaled.transpose(0, 2, 1), lower=True)
    projected = (a @ projection.reshape(-1, D).T).reshape(-1, K, R)
    projected -= jnp.einsum("krd,kd->kr", projection, b)[None]
    squares = (a * a) @ precision.T - 2 * a @ (b * precision).T + (b * b * precision).sum(1)[None]
    log_det = p["log_noise"].sum(1) + 2 * jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)).sum(1)
    log_weights = jax.nn.log_softmax(p["logits"])
    constant = log_weights - 0.5 * (log_det + D * jnp.log(2 * jnp.pi))
    return jax.nn.logsumexp(constant[None] - 0.5 * (squares - (projected**2).sum(2)), axis=1)


def numpyro_form(p: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    distribution = find("numpyro.distributions").LowRankMultivariateNormal(
        p["means"], p["loadings"], jnp.exp(p["log_noise"])
    )
    with jax.numpy_rank_promotion("allow"):
        log_prob = distribution.log_prob(x[:, None, :])
    return jax.nn.logsumexp(jax.nn.log_softmax(p["logits"])[None] + log_prob, axis=1)


def _jax_case(form: Callable[..., jax.Array], direction: str, size: Size) -> Callable[[], Any]:
    parameters, x = (jax.tree.map(jnp.asarray, leaf) for leaf in draw(size))

    def forward_and_backward(p: Any, x: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: form(p, x).mean())(p)

    function = form if direction == "forward" else forward_and_backward
    with jax.default_matmul_precision("float32"):  # which accelerators otherwise lower
        compiled = jax.jit(function).lower(parameters, x).compile()
    return lambda: compiled(parameters, x)


def _torch_case(direction: str, size: Size) -> Callable[[], Any]:
    torch = find("torch")
    parameters, x = draw(size)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    leaves = {k: torch.tensor(v, device=device, requires_grad=True) for k, v in parameters.items()}
    x = torch.tensor(x, device=device)

    def log_prob() -> Any:
        d = torch.distributions
        components = d.LowRankMultivariateNormal(
            leaves["means"], leaves["loadings"], leaves["log_noise"].exp(), validate_args=False
        )
        weights = d.Categorical(logits=leaves["logits"], validate_args=False)
        return d.MixtureSameFamily(weights, components, validate_args=False).log_prob(x)

    def forward() -> Any:
        with torch.no_grad():
            return log_prob().cpu().numpy()

    def forward_and_backward() -> Any:
        value = log_prob().mean()
        grads = torch.autograd.grad(value, [leaves[name] for name in PARAMETERS])
        return value.item(), {k: g.cpu().numpy() for k, g in zip(PARAMETERS, grads, strict=True)}

    return forward if direction == "forward" else forward_and_backward


def light_mixture(parameters: Mapping[str, np.ndarray]) -> artifact.Mixture:
    """Return the float64 NumPy mixture, the reference."""
    return artifact.Mixture(np.zeros(1), *(parameters[name][None] for name in PARAMETERS))


def _sklearn_case(size: Size) -> Callable[[], Any]:
    from sklearn.mixture import GaussianMixture

    p, x = draw(size)
    covariances = p["loadings"] @ p["loadings"].transpose(0, 2, 1)
    covariances[:, np.arange(size.D), np.arange(size.D)] += np.exp(p["log_noise"])
    peer = GaussianMixture(size.K)
    weights = np.exp(p["logits"] - p["logits"].max())
    peer.weights_, peer.means_, peer.covariances_ = weights / weights.sum(), p["means"], covariances
    inverse = np.linalg.inv(np.linalg.cholesky(covariances))
    peer.precisions_cholesky_ = inverse.transpose(0, 2, 1).astype(np.float32)
    return lambda: peer.score_samples(x)


METHODS = {
    "ours": lambda direction, size: _jax_case(ours, direction, size),
    "plain matrix products (JAX)": lambda direction, size: _jax_case(plain, direction, size),
    "numpyro": lambda direction, size: _jax_case(numpyro_form, direction, size),
    "torch": _torch_case,
    "sklearn, full covariance": lambda _, size: _sklearn_case(size),
}
LIBRARIES = {"numpyro": "numpyro", "torch": "torch", "sklearn, full covariance": "sklearn"}


def prepare_case(method: str, direction: str, *size: str) -> Callable[[], Any]:
    """Return one case for `benchmarks.memory`."""
    return METHODS[method](direction, Size(*map(int, size)))


def matrix_products(size: Size) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the two products that set the machine's rate, with their operations."""
    rng = np.random.default_rng(0)
    product = jax.jit(partial(jnp.matmul, precision="float32"))
    shapes = {
        "product of the density's shape": (size.N, size.D, size.K * (size.R + 2)),
        "square product": (SQUARE, SQUARE, SQUARE),
    }
    products = {}
    for name, (n, d, m) in shapes.items():
        left = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
        right = jnp.asarray(rng.normal(size=(d, m)), jnp.float32)
        products[name] = (lambda left=left, right=right: product(left, right), 2 * n * d * m)
    return products


def copying() -> dict[str, Callable[[], Any]]:
    """Return what sets an accelerator's bandwidth; nothing on a CPU, whose caches hold blocks."""
    if jax.default_backend() == "cpu":
        return {}
    numbers = jnp.zeros(COPIED, jnp.float32)
    add = jax.jit(lambda numbers: numbers + 1)
    return {COPY: lambda: add(numbers)}


def check(method: str, direction: str, result: Any, size: Size) -> float:
    """Return the relative error of a value, after it was seen to be the same density."""
    parameters, x = draw(size)
    exact = light_mixture(parameters).log_prob(x)
    value, exact = (result, exact) if direction == "forward" else (result[0], exact.mean())
    error = np.abs(np.asarray(value, np.float64) - exact) / np.maximum(1.0, np.abs(exact))
    if not error.max() < 1e-3:
        raise AssertionError(f"{method} at {size}: log-density off by {error.max():.2g} of itself.")
    return float(error.max())


def compare_gradients(results: Mapping[str, Any]) -> None:
    """Raise AssertionError unless all methods have the same gradients."""
    reference = results["ours"][1]
    for method, (_, gradients) in results.items():
        for name in PARAMETERS:
            got, want = np.asarray(gradients[name]), np.asarray(reference[name])
            difference = np.linalg.norm(got - want) / np.linalg.norm(want)
            if not difference < GRADIENT_TOLERANCE:
                raise AssertionError(f"{method}: gradient of {name} off by {difference:.2g}.")


def measure_one(size: Size, direction: str, with_memory: bool) -> tuple[Table, dict[str, Any]]:
    """Measure all methods at one size in one direction."""
    cases, compiling, absent, memory = {}, {}, {}, {}
    for method, prepare in METHODS.items():
        if direction != "forward" and method.startswith("sklearn"):
            continue
        if method in LIBRARIES and find(LIBRARIES[method]) is None:
            absent[method] = missing(LIBRARIES[method])
            continue
        if with_memory:
            memory[method] = peak_memory("density", method, direction, *map(str, size))
            if memory[method] is None and method in LIBRARIES:
                absent[method] = "does not fit the memory of this machine"
                continue
        start = time.perf_counter()
        cases[method] = prepare(direction, size)
        compiling[method] = time.perf_counter() - start
    results = {method: case() for method, case in cases.items()}
    errors = {m: check(m, direction, result, size) for m, result in results.items()}
    if direction != "forward":
        compare_gradients(results)
    del results
    products = matrix_products(size)
    others = {name: product for name, (product, _) in products.items()} | copying()
    timings = interleave({**others, **cases}, seconds=1.5)
    rate = max(count / timings[name].median for name, (_, count) in products.items())
    passes = 1 if direction == "forward" else 3
    rows, data = [], {}
    bandwidth = 8 * COPIED / timings[COPY].median if COPY in timings else None
    for name, (_, count) in products.items():
        fraction = count / timings[name].median / rate
        rows.append((name, str(timings[name]), f"{100 * fraction:.0f} %", "", "", "", ""))
    for method in METHODS:
        if method in absent:
            rows.append((method, absent[method], *[""] * 5))
        if method not in cases:
            continue
        seconds = timings[method].median
        fraction = passes * size.operations / seconds / rate
        data[method] = {
            "seconds": seconds,
            "fraction_of_matrix_product_rate": fraction,
            "times_ours": seconds / timings["ours"].median,
            "peak_bytes": memory.get(method),
            "relative_error": errors[method],
            "compile_seconds": compiling[method],
        }
        share = f"{100 * fraction:.0f} %"
        if bandwidth is not None:
            of_bandwidth = passes * size.bytes_moved / seconds / bandwidth
            data[method]["fraction_of_bandwidth"] = of_bandwidth
            share += f", {100 * of_bandwidth:.0f} %"
        # A full covariance is other work, so that its rate would say nothing.
        rows.append(
            (
                method,
                str(timings[method]),
                "" if method.startswith("sklearn") else share,
                f"{seconds / timings['ours'].median:.2f}",
                show(memory.get(method)) if with_memory else "",
                f"{errors[method]:.0e}",
                f"{compiling[method]:.1f} s",
            )
        )
    columns = ("method", "time (quartiles)", "of the rate", "times ours", "peak memory", "error", "prepared in")  # fmt: skip  # noqa: E501
    title = f"Log-density, {direction}, {size}; {rate / 1e9:.0f} GFLOP/s"
    if bandwidth is not None:
        title += f", {bandwidth / 1e9:.0f} GB/s"
        columns = ("method", "time (quartiles)", "of the rate, of the bandwidth", *columns[3:])
    return Table(title, columns, rows), {"rate": rate, "bandwidth": bandwidth, "methods": data}


def measure(full: bool) -> Report:
    """Measure all sizes, forward, and forward + backward."""
    tables, data = [], {}
    sizes = FULL if full else SHORT
    if jax.default_backend() != "cpu":
        sizes += LARGE
    for size in sizes:
        for direction in ("forward", "forward + backward"):
            # Memory needs a fresh process for each method.
            table, numbers = measure_one(size, direction, with_memory=full)
            tables.append(table)
            print(f"measured: {direction}, {size}", flush=True)
            data[f"{direction}, {size}"] = numbers
    return Report("density", tables, data)


if __name__ == "__main__":
    main("density", measure)
