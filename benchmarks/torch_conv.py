"""The convolutional field of images in PyTorch, as a user would write it; see `torch_cpmm`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvField(nn.Module):
    """f(t, h) of states that are images, a row each, with the shapes of our `ConvField`."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        height, width, _ = ours.shape
        self.height, self.width, self.groups = height, width, ours.groups
        for name in ("layers", "down", "up", "heads"):
            convolutions = [
                nn.Conv2d(*layer.kernel.shape[2:], layer.kernel.shape[0], padding="same")
                for layer in getattr(ours, name)
            ]
            setattr(self, name, nn.ModuleList(convolutions))
        self.shares = [head.in_channels for head in self.heads]
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        self.register_buffer("place", place if ours.coordinates else place[:0], persistent=False)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        def with_time(image: Tensor) -> Tensor:
            return torch.cat([image, t.expand(len(image), 1, *image.shape[2:])], dim=1)

        pixels = self.height * self.width
        parts = h.split([pixels * size for size in self.groups], dim=1)
        images = [part.unflatten(1, (self.height, self.width, -1)) for part in parts]
        place = self.place.expand(len(h), -1, -1, -1)
        hidden = torch.cat([*(image.permute(0, 3, 1, 2) for image in images), place], dim=1)
        for layer in self.layers:
            hidden = torch.sin(layer(with_time(hidden)))
        seen = []
        for layer in self.down:
            seen.append(hidden)
            hidden = torch.sin(layer(with_time(F.avg_pool2d(hidden, 2))))
        for layer in self.up:
            finer = F.interpolate(hidden, scale_factor=2, mode="nearest")
            hidden = torch.sin(layer(with_time(torch.cat([finer, seen.pop()], dim=1))))
        slopes = [
            head(own).permute(0, 2, 3, 1).flatten(1)
            for head, own in zip(self.heads, hidden.split(self.shares, dim=1), strict=True)
        ]
        return torch.cat(slopes, dim=1)


def parameters_of(ours: Any) -> dict[str, np.ndarray]:
    """Return kernels and biases of our field by their names and layouts here."""
    arrays = {}
    for name in ("layers", "down", "up", "heads"):
        for i, layer in enumerate(getattr(ours, name)):
            kernel = np.asarray(layer.kernel[...])
            arrays[f"{name}.{i}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
            arrays[f"{name}.{i}.bias"] = np.asarray(layer.bias[...])
    return arrays
