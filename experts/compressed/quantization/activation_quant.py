"""Timestep-aware activation quantization: a layer's input is rounded on a grid that depends on t.

Wang et al. 2025 (QuEST), arXiv:2402.03666: one step size for each of a few calibrated timesteps, or for each of them
and each channel, and the nearest timestep's at any other. `TimestepActivationQuantizer` is a child of the linear or
convolutional layer whose input it rounds; the layer's weight may be quantized too. One `TimestepRecorder` on the whole
network provides the timestep.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from experts.compressed.conditional.timestep_recorder import TimestepRecorder, find_recorder
from experts.compressed.quantization.fake_quant import fake_quantize_at, scaled_gradient

Activations = Float[Tensor, "batch *feature"]
Grids = tuple[Float[Tensor, "grid channel"], Float[Tensor, "grid channel"]]
"""Step sizes and zero points."""

NAME = "timed_input"
"""Name of the quantizer in its layer."""
LR_FACTOR = 10.0
"""Learning rate of step sizes relative to that of weights; Wang et al. 2025 (arXiv:2402.03666): 1e-4 and 1e-5."""


class TimestepActivationQuantizer(nn.Module):
    """The grids of one layer's input, one for each calibrated timestep and channel, or all channels."""

    KIND: ClassVar[str] = NAME
    times: Float[Tensor, " grid"]
    """Calibrated timesteps, in the network's unit."""
    steps: Float[Tensor, "grid channel"]
    zeros: UInt8[Tensor, "grid channel"]
    """Zero points."""
    log_change: nn.Parameter | None
    """Learned change of the step sizes, exp(LR_FACTOR log_change); None if they are frozen."""

    def __init__(
        self, recorder: TimestepRecorder, grids: int, bits: Literal[4, 8], channels: int = 1, axis: int = -1
    ) -> None:
        """Allocate unit step sizes; `axis` is that of the channels, of which one stands for all."""
        super().__init__()
        self.recorder, self.bits, self.axis = recorder, bits, axis
        self.register_buffer("times", torch.zeros(grids))
        self.register_buffer("steps", torch.ones(grids, channels, dtype=torch.float16))
        self.register_buffer("zeros", torch.zeros(grids, channels, dtype=torch.uint8))
        self.register_parameter("log_change", None)

    def settings(self) -> dict[str, Any]:
        """Return its number of grids, its channels and its bits as JSON."""
        grids, channels = self.steps.shape
        return {"grids": grids, "channels": channels, "bits": self.bits}

    def set_grids(self, times: Float[Tensor, " grid"], grids: Grids) -> None:
        """Store calibrated times, step sizes and zero points."""
        for buffer, values in zip((self.times, self.steps, self.zeros), (times, *grids), strict=True):
            buffer.copy_(values)

    def forward(self, x: Activations) -> Activations:
        """Round every row on the grid of the nearest calibrated timestep."""
        timestep = self.recorder.timestep
        if timestep is None or len(timestep) != len(x):
            raise RuntimeError(
                "this layer needs one timestep a row of the network's call; call the whole network, not the layer alone"
            )
        nearest = (timestep.to(self.times.dtype)[:, None] - self.times).abs().argmin(1)
        shape = [len(x), *[1] * (x.ndim - 1)]
        shape[self.axis] = self.steps.shape[1]
        steps, zeros = (values[nearest].reshape(shape) for values in (self._steps(x.numel()), self.zeros.float()))
        return fake_quantize_at(x.float(), steps, zeros, self.bits).to(x.dtype)

    def make_learnable(self) -> None:
        """Make the step sizes learnable."""
        self.log_change = nn.Parameter(torch.zeros(self.steps.shape, device=self.steps.device))

    def freeze(self) -> None:
        """Apply the learned change and freeze the step sizes."""
        if self.log_change is not None:
            self.steps.copy_(self.steps.float() * (LR_FACTOR * self.log_change.detach()).exp())
            self.log_change = None

    def _steps(self, entries: int) -> Float[Tensor, "grid channel"]:
        steps = self.steps.float()
        if self.log_change is None:
            return steps
        # Esser et al. 2020 (LSQ, arXiv:1902.08153, section 2.2): scale gradients of a step size by 1 / sqrt(N q_max).
        factor = (entries / steps.shape[1] * (2**self.bits - 1)) ** -0.5
        return steps * (LR_FACTOR * scaled_gradient(self.log_change, factor)).exp()


def quantize_input(
    model: nn.Module, path: str, grids: int, bits: Literal[4, 8], channels: int = 1
) -> TimestepActivationQuantizer:
    """Attach an empty quantizer to a layer's input, in place, and return it; `channels` is 1 or all of them."""
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or hasattr(layer, NAME):
        raise ValueError(f"{path} must be a linear or convolutional layer without a quantizer; choose another layer")
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    quantizer = TimestepActivationQuantizer(find_recorder(model), grids, bits, channels, axis)
    layer.add_module(NAME, quantizer)
    layer.register_forward_pre_hook(_round_input)
    return quantizer


def replace_with_timestep_quantizer(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty quantizer at `<layer>.timed_input`; raise `ValueError` if it does not fit."""
    layer, _, name = path.rpartition(".")
    if name != NAME or settings["bits"] not in (4, 8) or min(int(settings["grids"]), int(settings["channels"])) < 1:
        raise ValueError(f"{path} is no {NAME} of {settings}")
    quantize_input(model, layer, int(settings["grids"]), settings["bits"], int(settings["channels"]))


def _round_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer = layer.get_submodule(NAME)
    return (quantizer(args[0]), *args[1:])
