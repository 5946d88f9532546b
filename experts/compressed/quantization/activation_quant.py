"""Timestep-aware activation quantization: a layer's input is rounded on a grid that depends on t.

Wang et al. 2025 (QuEST), arXiv:2402.03666: one step size for each of a few calibrated timesteps, and the nearest one's
at any other. `TimestepActivationQuantizer` is a child of the linear or convolutional layer whose input it rounds; the
layer's weight may be quantized too. One `TimestepRecorder` on the whole network provides the timestep.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.compressed.quantization.fake_quant import fake_quantize_at, scaled_gradient

Activations = Float[Tensor, "batch *feature"]

NAME = "timed_input"
"""Name of the quantizer in its layer."""
LR_FACTOR = 10.0
"""Learning rate of step sizes relative to that of weights; Wang et al. 2025 (arXiv:2402.03666): 1e-4 and 1e-5."""


class TimestepRecorder:
    """Records the timesteps of a network's latest call, in the network's unit."""

    def __init__(self) -> None:
        self.timestep: Float[Tensor, " batch"] | None = None

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the timesteps, the network's second argument or one of the names that classes give it."""
        t = args[1] if len(args) > 1 else kwargs["timestep"] if "timestep" in kwargs else kwargs["t"]
        self.timestep = t.detach()


class TimestepActivationQuantizer(nn.Module):
    """The grids of one layer's input, one for each calibrated timestep."""

    KIND: ClassVar[str] = NAME
    times: Float[Tensor, " grid"]
    """Calibrated timesteps, in the network's unit."""
    steps: Float[Tensor, " grid"]
    zeros: Float[Tensor, " grid"]
    """Zero points, as integers."""
    log_change: nn.Parameter | None
    """Learned change of the step sizes, exp(LR_FACTOR log_change); None if they are frozen."""

    def __init__(self, recorder: TimestepRecorder, grids: int, bits: Literal[4, 8]) -> None:
        """Allocate unit step sizes."""
        super().__init__()
        self.recorder, self.bits = recorder, bits
        self.register_buffer("times", torch.zeros(grids))
        self.register_buffer("steps", torch.ones(grids))
        self.register_buffer("zeros", torch.zeros(grids))
        self.register_parameter("log_change", None)

    def settings(self) -> dict[str, Any]:
        """Return its number of grids and its bits as JSON."""
        return {"grids": len(self.times), "bits": self.bits}

    def forward(self, x: Activations) -> Activations:
        """Round every row on the grid of the nearest calibrated timestep."""
        if self.recorder.timestep is None:
            raise RuntimeError(
                "this layer needs the timestep of the network's call; call the whole network, not the layer alone"
            )
        nearest = (self.recorder.timestep.to(self.times.dtype)[:, None] - self.times).abs().argmin(1)
        shape = (-1, *[1] * (x.ndim - 1))
        steps, zeros = self._steps(x.numel())[nearest].reshape(shape), self.zeros[nearest].reshape(shape)
        return fake_quantize_at(x.float(), steps, zeros, self.bits).to(x.dtype)

    def make_learnable(self) -> None:
        """Make the step sizes learnable."""
        self.log_change = nn.Parameter(torch.zeros_like(self.steps))

    def freeze(self) -> None:
        """Apply the learned change and freeze the step sizes."""
        if self.log_change is not None:
            self.steps.mul_((LR_FACTOR * self.log_change.detach()).exp())
            self.log_change = None

    def _steps(self, entries: int) -> Float[Tensor, " grid"]:
        if self.log_change is None:
            return self.steps
        # Esser et al. 2020 (LSQ, arXiv:1902.08153, section 2.2): scale gradients of a step size by 1 / sqrt(N q_max).
        factor = (entries * (2**self.bits - 1)) ** -0.5
        return self.steps * (LR_FACTOR * scaled_gradient(self.log_change, factor)).exp()


def quantize_input(model: nn.Module, path: str, grids: int, bits: Literal[4, 8]) -> TimestepActivationQuantizer:
    """Attach an empty quantizer to a layer's input, in place, and return it."""
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or hasattr(layer, NAME):
        raise ValueError(f"{path} must be a linear or convolutional layer without a quantizer; choose another layer")
    quantizer = TimestepActivationQuantizer(_get_recorder(model), grids, bits)
    layer.add_module(NAME, quantizer)
    layer.register_forward_pre_hook(_round_input)
    return quantizer


def replace_with_timestep_quantizer(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty quantizer at `<layer>.timed_input`; raise `ValueError` if it does not fit."""
    layer, _, name = path.rpartition(".")
    if name != NAME or settings["bits"] not in (4, 8) or int(settings["grids"]) < 1:
        raise ValueError(f"{path} is no {NAME} of {settings}")
    quantize_input(model, layer, int(settings["grids"]), settings["bits"])


def _round_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer = layer.get_submodule(NAME)
    return (quantizer(args[0]), *args[1:])


def _get_recorder(model: nn.Module) -> TimestepRecorder:
    """Return the network's recorder; add one if it has none."""
    for module in model.modules():
        if isinstance(module, TimestepActivationQuantizer):
            return module.recorder
    recorder = TimestepRecorder()
    model.register_forward_pre_hook(recorder, with_kwargs=True)
    return recorder
