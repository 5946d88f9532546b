"""Several kernels of one layer, merged into one by the time of the call: capacity at the cost of a single layer.

    y = W(t) x + b(t),    W(t) = sum_k r_k(t) W_k,    b(t) = sum_k r_k(t) b_k,    r(t) = softmax(R f(t) + a)

Conditionally parameterized convolutions (Yang et al. 2019, arXiv:1904.04971), which A-SDM has in shortened U-Nets (Zhu
et al. 2024, arXiv:2406.00210: ME-CondConv). Here the routing r reads features f of the time alone. So all rows of a
sampling step share one kernel; rows at different t, as in training, have one each. A layer is linear, which makes the
merge exact: y = sum_k r_k(t) (W_k x + b_k).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.compressed.conditional.timestep_recorder import TimestepRecorder, find_recorder

FREQUENCIES = 3
"""Octaves of f, from half a turn over all times."""
SPREAD = 1.0
"""Standard deviation of the initial routing weights of equal kernels; with none, equal kernels would stay equal."""
KEPT_LOGIT = 5.0
"""Initial logit of the layer's own kernel beside those of other layers."""


class KernelExperts(nn.Module):
    """A linear or convolutional layer of several kernels, in a network that has a `TimestepRecorder`."""

    KIND: ClassVar[str] = "kernel_experts"

    def __init__(self, recorder: TimestepRecorder, layer: nn.Linear | nn.Conv2d, experts: int, scale: float) -> None:
        """Copy the layer's kernel `experts` times; `scale` is the network's timestep at t = 1.

        Raises `ValueError` for a layer that is divided into groups, dilated, or padded by other numbers than zeros.
        """
        super().__init__()
        self.stride: tuple[int, ...] = (1,)
        self.padding: str | tuple[int, ...] = (0,)
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
                raise ValueError(f"kernels of {layer} cannot be merged by row; choose another layer")
            self.stride, self.padding = layer.stride, layer.padding
            self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        else:
            self.in_features, self.out_features = layer.in_features, layer.out_features
        self.recorder, self.scale = recorder, scale
        self.kernels = nn.Parameter(torch.stack([layer.weight.detach()] * experts))
        self.biases = None if layer.bias is None else nn.Parameter(torch.stack([layer.bias.detach()] * experts))
        self.router = nn.Linear(2 * FREQUENCIES, experts).to(layer.weight)

    @torch.no_grad()
    def inherit(self, layers: Sequence[nn.Linear | nn.Conv2d], generator: torch.Generator) -> None:
        """Put the kernels of other layers after the own one, which leads them at first; the rest stay its copies.

        Raises `ValueError` for a layer of another shape, or for more layers than there are other kernels.
        """
        shape, count = tuple(self.kernels.shape[1:]), len(layers)
        if count >= len(self.kernels) or any(tuple(layer.weight.shape) != shape for layer in layers):
            raise ValueError(
                f"up to {len(self.kernels) - 1} layers of shape {shape} can be inherited, not {list(layers)}"
            )
        self.router.weight.copy_(SPREAD * torch.randn(self.router.weight.shape, generator=generator))
        self.router.weight[: count + 1] = 0.0
        nn.init.zeros_(self.router.bias)
        self.router.bias[1 : count + 1] = -KEPT_LOGIT
        for number, layer in enumerate(layers, start=1):
            self.kernels[number].copy_(layer.weight)
            if self.biases is not None and layer.bias is not None:
                self.biases[number].copy_(layer.bias)

    def settings(self) -> dict[str, Any]:
        """Return its number of kernels and the network's timestep at t = 1; shapes are those of the layer."""
        return {"experts": self.router.out_features, "scale": self.scale}

    def routing(self, rows: int) -> Float[Tensor, "row expert"]:
        """Return r of every row, or of one if all rows are at the same time."""
        timestep = self.recorder.timestep
        if timestep is None:
            raise RuntimeError("this layer needs the time of a call; call the whole network, not the layer alone")
        t = timestep.reshape(-1).to(self.router.weight.dtype) / self.scale
        if bool((t == t[0]).all()):
            t = t[:1]
        elif len(t) != rows:
            raise RuntimeError(f"this layer has {rows} rows and the network's call {len(t)} times; give one a row")
        angles = t[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=t.device, dtype=t.dtype) * (math.pi / 2)
        gates: Tensor = self.router(torch.cat([angles.sin(), angles.cos()], dim=1)).softmax(-1)
        return gates

    def merged(self, rows: int) -> tuple[Tensor, Float[Tensor, "row out"] | None]:
        """Return W(t), of shape (row, *kernel), and b(t): of every row, or of one if all rows are at the same time."""
        gates = self.routing(rows)
        kernels = self.kernels  # read once: quantized ones are unpacked
        weight = (gates @ kernels.flatten(1)).reshape(len(gates), *kernels.shape[1:])
        return weight, None if self.biases is None else gates @ self.biases

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output by the merged kernel."""
        weight, bias = self.merged(len(x))
        if weight.ndim == 3:
            if len(weight) == 1:
                return functional.linear(x, weight[0], None if bias is None else bias[0])
            flat = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), weight.transpose(1, 2))
            flat = flat if bias is None else flat + bias[:, None]
            return flat.reshape(*x.shape[:-1], -1)
        if len(weight) == 1:
            return functional.conv2d(x, weight[0], None if bias is None else bias[0], self.stride, self.padding)
        grouped = functional.conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            self.stride,
            self.padding,
            groups=len(x),
        )
        return grouped.reshape(len(x), -1, *grouped.shape[2:])


def put_kernel_experts(model: nn.Module, path: str, experts: int, scale: float) -> KernelExperts:
    """Replace a linear or convolutional layer by one of several equal kernels, in place, and return it.

    Raises `ValueError` if the path is of another kind of layer.
    """
    layer = model.get_submodule(path)
    if type(layer) not in (nn.Linear, nn.Conv2d) or experts < 1:
        raise ValueError(
            f"{path} is a {type(layer).__name__}, and a linear or convolutional layer takes several kernels"
        )
    replacement = KernelExperts(find_recorder(model), layer, experts, scale)  # type: ignore[arg-type]
    model.set_submodule(path, replacement)
    return replacement


def replace_with_kernel_experts(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty `KernelExperts` in the place of a layer; raise `ValueError` if it does not fit."""
    put_kernel_experts(model, path, int(settings["experts"]), float(settings["scale"]))
