"""Moving average of parameters, with a horizon that grows with the run, so that it suits short runs too."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def power_law_gamma(width: float) -> float:
    """Return the exponent whose power-function average has this relative width (0 to 0.28).

    Karras et al. 2024, arXiv:2312.02696, equation 123: width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    inverse_square = width**-2
    return float(np.roots([1, 7, 16 - inverse_square, 12 - inverse_square]).real.max())


class MovingAverage:
    """Power-function average: after n steps, step i has weight (i^p - (i - 1)^p) / n^p with p = gamma + 1.

    Karras et al. 2024, arXiv:2312.02696, section 3.1 and equation 127.
    The first step replaces the initial parameters.
    """

    def __init__(self, model: nn.Module, width: float) -> None:
        self.gamma = power_law_gamma(width)
        self.source = dict(model.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self.source.items()}
        self._targets = list(self.average.values())
        self._sources = [parameter.detach() for parameter in self.source.values()]

    def decay(self, step: int) -> float:
        """Return the weight of the previous average at a step, counted from 1."""
        return float((1 - 1 / step) ** (self.gamma + 1))

    def update(self, step: int) -> None:
        """Add the parameters after `step` steps to the average."""
        torch._foreach_lerp_(self._targets, self._sources, 1 - self.decay(step))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged parameters within a block, without a copy of either."""
        trained = [parameter.data for parameter in self.source.values()]
        try:
            for parameter, average in zip(self.source.values(), self._targets, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.source.values(), trained, strict=True):
                parameter.data = data

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model's parameters with the average."""
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        with torch.no_grad():
            for name, average in self.average.items():
                parameters[name].copy_(average)
