"""The labelled CPMM in PyTorch and torchdiffeq, as a user of theirs would write it.

    .venv/bin/python -m benchmarks.training_step

times it against ours, and `benchmarks.images` where the field is convolutional. The flattened state
of each class is a row of a matrix, `torchdiffeq.odeint` solves the ODE, and the components are a
batch of `LowRankMultivariateNormal`. The gradient goes back through the solver's operations;
`odeint_adjoint`, which solves backwards for it, took 1.7 to 2 times as long with fixed steps and
over ten times as long with adaptive ones. It runs eagerly: `torch.compile` on the field gained
nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal
from torchdiffeq import odeint

import cpmm_jax as cpmm
from benchmarks import torch_conv
from cpmm_jax.dynamics.fields import MLPField

DEVICE = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # float32, as elsewhere
INITIAL = ("means", "loadings", "log_noise", "augmented")


class Field(nn.Module):
    """f(t, h): layers sin(W h + w t + b), and a linear one at the end."""

    def __init__(self, size: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(*shape) for shape in pairwise([size, *widths])])
        self.times = nn.ModuleList([nn.Linear(1, width, bias=False) for width in widths])
        self.output = nn.Linear(widths[-1], size)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        clock = t.reshape(1)
        for layer, time_layer in zip(self.layers, self.times, strict=True):
            h = torch.sin(layer(h) + time_layer(clock))
        return self.output(h)


class TorchCPMM(nn.Module):
    """One trajectory per class; the loss is the mean of -log p(x, y).

    Args:
        model: a `cpmm.CPMM` with one trajectory per class and one field, whose sizes, noise floor
            and parameters this one takes over.
        solver: keyword arguments of `odeint`. The methods "heun2", "midpoint" and "dopri5" have the
            tableaus of diffrax's Heun, Midpoint and Dopri5; "rk4" is the 3/8 rule.
    """

    def __init__(self, model: cpmm.CPMM, solver: Mapping[str, Any]) -> None:
        super().__init__()
        if model.num_trajectories != 1 or model.field_per_class or model.logits is not None:
            raise ValueError("`model` must have one trajectory per class and one field.")
        self.dim, self.rank, self.solver = model.dim, model.rank, solver
        arrays = {name: torch.tensor(value) for name, value in parameters_of(model).items()}
        for name in (*INITIAL, "class_logits"):
            setattr(self, name, nn.Parameter(torch.empty_like(arrays[name])))
        noise_floor = torch.tensor(np.exp(model.log_floor[...]))
        self.register_buffer("noise_floor", noise_floor, persistent=False)
        if isinstance(model.field, MLPField):
            widths = [layer.out_features for layer in model.field.layers]
            self.field = Field(model.field.output.out_features, widths)
        else:
            self.field = torch_conv.ConvField(model.field)
        self.load_state_dict(arrays)
        self.to(DEVICE)

    def components(self, times: Tensor) -> LowRankMultivariateNormal:
        """Solve the ODE over [0, 1] and read the components at `times`, batch shape (T, C)."""
        start = torch.cat([getattr(self, name).flatten(1) for name in INITIAL], dim=1)
        zero, one = times.new_tensor([0.0, 1.0]).split(1)
        states = odeint(self.field, start, torch.cat([zero, times, one]), **self.solver)[1:-1]
        sizes = [self.dim, self.dim * self.rank, self.dim, self.augmented.shape[1]]
        means, loadings, log_noise, _ = states.split(sizes, dim=-1)
        return LowRankMultivariateNormal(
            means,
            loadings.unflatten(-1, (self.dim, self.rank)),
            log_noise.exp() + self.noise_floor,
            validate_args=False,
        )

    def forward(self, times: Tensor, x: Tensor, y: Tensor) -> Tensor:
        by_component = self.components(times).log_prob(x[:, None, None, :])  # (N, T, C)
        by_class = by_component.logsumexp(dim=1) - math.log(len(times))
        joint = by_class + self.class_logits.log_softmax(dim=0)
        return -joint.gather(1, y[:, None]).mean()


class TorchTraining:
    """Training, one step a call: the gradient clipped to norm 1, and Adam.

    Args:
        model: trained in place.
        draws: pseudotimes (T,), examples (N, D) and labels (N,) of steps, used in turn.
        learning_rate: of Adam.
    """

    def __init__(
        self, model: TorchCPMM, draws: Sequence[Sequence[np.ndarray]], learning_rate: float
    ) -> None:
        self.model, self.done = model, 0
        self.threads = torch.get_num_threads()
        self.draws = [
            (tensor(times), tensor(x), tensor(y, dtype=torch.int64)) for times, x, y in draws
        ]
        self.optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True)

    def run(self) -> float:
        """Do a step; return the loss before it."""
        torch.set_num_threads(self.threads)
        draw = self.draws[self.done % len(self.draws)]
        self.done += 1
        self.optimizer.zero_grad()
        loss = self.model(*draw)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def gradient(self) -> dict[str, np.ndarray]:
        """Return the clipped gradient of the last step, by name."""
        return gradient_of(self.model)

    def choose_threads(self, trials: int = 2) -> None:
        """Use one thread or as many as there are, whichever is faster here and now."""
        seconds = {}
        for threads in {1, torch.get_num_threads()}:
            self.threads = threads
            self.run()
            start = time.perf_counter()
            for _ in range(trials):
                self.run()
            seconds[threads] = time.perf_counter() - start
        self.threads = min(seconds, key=seconds.__getitem__)


def tensor(value: Any, **settings: Any) -> Tensor:
    """Return a tensor where JAX computes: on the GPU if it has one."""
    return torch.tensor(value, device=DEVICE, **settings)


def gradient_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the gradient of a model's parameters, by name."""
    return {name: value.grad.cpu().numpy() for name, value in model.named_parameters()}


def parameters_of(model: cpmm.CPMM) -> dict[str, np.ndarray]:
    """Return our parameters, or a gradient in their place, by their names and layouts here."""
    arrays = {name: np.asarray(getattr(model, name)[...])[:, 0] for name in INITIAL}
    arrays["class_logits"] = np.asarray(model.class_logits[...])
    perceptron = isinstance(model.field, MLPField)
    of_field = (perceptron_parameters if perceptron else torch_conv.parameters_of)(model.field)
    return arrays | {f"field.{name}": value for name, value in of_field.items()}


def perceptron_parameters(field: MLPField) -> dict[str, np.ndarray]:
    linear = {f"layers.{i}": layer for i, layer in enumerate(field.layers)}
    linear |= {f"times.{i}": layer for i, layer in enumerate(field.times)}
    linear["output"] = field.output
    arrays = {}
    for name, layer in linear.items():
        arrays[f"{name}.weight"] = np.asarray(layer.kernel[...]).T
        if layer.bias is not None:
            arrays[f"{name}.bias"] = np.asarray(layer.bias[...])
    return arrays
