"""A layer's input, rounded on a grid that depends on the time: activations differ from the clean end to the noisy one.

Wang et al. 2025 (QuEST), arXiv:2402.03666: one step size for each of a few calibrated times, and at any other time that
of the nearest. `TimedInput` hangs in the layer that it serves, a linear or a convolutional one, whose weight may have
whatever form; a `Clock` on the whole network tells all of them the time.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.compressed.quantization.fake_quant import fake_quantize_at, scaled_gradient

Rows = Float[Tensor, "batch *feature"]

NAME = "timed_input"
"""What the form is called in its layer."""
RATE = 10.0
"""Step sizes learn so many times as quickly as weights; Wang et al. 2025 (arXiv:2402.03666): 1e-4 and 1e-5."""


class TimestepRecorder:
    """The time of every row that a network was last asked about, in the network's own unit."""

    def __init__(self) -> None:
        self.now: Float[Tensor, " batch"] | None = None

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the time, just before the network is called with it; it comes second."""
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        self.now = t.detach()


class TimestepActivationQuantizer(nn.Module):
    """The grids of one layer's input."""

    KIND: ClassVar[str] = NAME
    times: Float[Tensor, " grid"]
    """Calibrated times, in the network's own unit."""
    steps: Float[Tensor, " grid"]
    zeros: Float[Tensor, " grid"]
    """Whole numbers: which number of a grid stands for zero."""
    log_change: nn.Parameter | None
    """How the step sizes change while they learn: exp(RATE log_change); None otherwise."""

    def __init__(self, clock: TimestepRecorder, grids: int, bits: Literal[4, 8]) -> None:
        """Empty."""
        super().__init__()
        self.clock, self.bits = clock, bits
        self.register_buffer("times", torch.zeros(grids))
        self.register_buffer("steps", torch.ones(grids))
        self.register_buffer("zeros", torch.zeros(grids))
        self.register_parameter("log_change", None)

    def settings(self) -> dict[str, Any]:
        """Its number of grids and its bits."""
        return {"grids": len(self.times), "bits": self.bits}

    def forward(self, x: Rows) -> Rows:
        """Every row on the grid of the calibrated time that is nearest to its own."""
        if self.clock.now is None:
            raise RuntimeError("this layer rounds by the time, which is not known: call the whole network")
        nearest = (self.clock.now.to(self.times.dtype)[:, None] - self.times).abs().argmin(1)
        shape = (-1, *[1] * (x.ndim - 1))
        steps, zeros = self._steps(x.numel())[nearest].reshape(shape), self.zeros[nearest].reshape(shape)
        return fake_quantize_at(x.float(), steps, zeros, self.bits).to(x.dtype)

    def make_learnable(self) -> None:
        """Make the step sizes learnable."""
        self.log_change = nn.Parameter(torch.zeros_like(self.steps))

    def freeze(self) -> None:
        """Keep the step sizes as they have become."""
        if self.log_change is not None:
            self.steps.mul_((RATE * self.log_change.detach()).exp())
            self.log_change = None

    def _steps(self, entries: int) -> Float[Tensor, " grid"]:
        if self.log_change is None:
            return self.steps
        # Esser et al. 2020 (LSQ, arXiv:1902.08153, section 2.2): gradients of a step size by 1 / sqrt(N q_max).
        factor = (entries * (2**self.bits - 1)) ** -0.5
        return self.steps * (RATE * scaled_gradient(self.log_change, factor)).exp()


def quantize_input(model: nn.Module, path: str, grids: int, bits: Literal[4, 8]) -> TimestepActivationQuantizer:
    """Have the input of a layer rounded, in place, and return the empty form."""
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or hasattr(layer, NAME):
        raise ValueError(f"{path} of the network is no linear or convolutional layer whose input is not rounded yet")
    form = TimestepActivationQuantizer(_clock_of(model), grids, bits)
    layer.add_module(NAME, form)
    layer.register_forward_pre_hook(_round)
    return form


def replace_with_timestep_quantizer(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form at `<layer>.timed_input`; `ValueError` if it does not fit."""
    layer, _, name = path.rpartition(".")
    if name != NAME or settings["bits"] not in (4, 8) or int(settings["grids"]) < 1:
        raise ValueError(f"{path} is no {NAME} of {settings}")
    quantize_input(model, layer, int(settings["grids"]), settings["bits"])


def _round(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    form = layer.get_submodule(NAME)
    return (form(args[0]), *args[1:])


def _clock_of(model: nn.Module) -> TimestepRecorder:
    """The network's clock, put there if it has none."""
    found = next((module.clock for module in model.modules() if isinstance(module, TimestepActivationQuantizer)), None)
    if found is None:
        found = TimestepRecorder()
        model.register_forward_pre_hook(found, with_kwargs=True)
    return found
