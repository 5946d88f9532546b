"""Moving averages of parameters, with a horizon that grows with the run, so that they suit short runs too.

Snapshots of two averages of fixed widths during a training rebuild the average of any width afterwards:
`rebuild_average`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddm_core.errors import DDMError
from experts.training.parallel.sharding import own_part

SNAPSHOTS = "ema"
"""Folder of the snapshots."""

SNAPSHOT_WIDTHS = (0.05, 0.1)
"""Relative widths of the averages of the snapshots; Karras et al. 2024, arXiv:2312.02696, section 3.2."""


class SnapshotError(DDMError, ValueError):
    """An average cannot be rebuilt from snapshots."""


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

    def __init__(self, model: nn.Module, width: float, *, is_on_host: bool = False) -> None:
        self.gamma = power_law_gamma(width)
        self.source = dict(model.named_parameters())
        place = torch.device("cpu") if is_on_host else None
        self.average = {
            name: parameter.detach().to(place or parameter.device, copy=True) for name, parameter in self.source.items()
        }
        self._targets = [own_part(average) for average in self.average.values()]
        self._sources = [own_part(parameter.detach()) for parameter in self.source.values()]

    def decay(self, step: int) -> float:
        """Return the weight of the previous average at a step, counted from 1."""
        return float((1 - 1 / step) ** (self.gamma + 1))

    def update(self, step: int) -> None:
        """Add the parameters after `step` steps to the average."""
        sources = self._sources
        if sources and sources[0].device != self._targets[0].device:
            sources = [source.to(target.device) for source, target in zip(sources, self._targets, strict=True)]
        torch._foreach_lerp_(self._targets, sources, 1 - self.decay(step))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the model's parameters and their average within a block, one after the other."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for source, target in zip(self._sources, self._targets, strict=True):
            trained = source.clone()
            source.copy_(target)
            target.copy_(trained)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model's parameters with the average."""
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        with torch.no_grad():
            for name, average in self.average.items():
                parameters[name].copy_(average)


def write_snapshots(folder: Path, averages: list[MovingAverage], step: int) -> None:
    """Write averages after `step` steps; a file is whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for width, average in zip(SNAPSHOT_WIDTHS, averages, strict=True):
        path = folder / f"{step:08d}-{width}.safetensors"
        unfinished = path.with_suffix(".part")
        save_file({name: value.contiguous().cpu() for name, value in average.average.items()}, unfinished)
        unfinished.replace(path)


def rebuild_average(folder: Path, width: float) -> dict[str, Tensor]:
    """Return the average of any width, 0 to 0.28, at the last snapshot of a folder, as parameters by name.

    It is the combination of all snapshots whose weights over the steps are nearest to those of that average, by least
    squares. Raises `SnapshotError` without snapshots.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SnapshotError(f"{folder} has no snapshots; train with training.ema_snapshots=16")
    profiles = [(int(path.stem.split("-")[0]), float(path.stem.split("-")[1])) for path in files]
    total: dict[str, Tensor] = {}
    for path, weight in zip(files, combination(profiles, (max(profiles)[0], width)), strict=True):
        for name, value in load_file(path).items():
            part = value.double() * weight
            total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}


def combination(profiles: list[tuple[int, float]], wanted: tuple[int, float]) -> list[float]:
    """Return the factors with which averages after (steps, of a relative width) add up to another one.

    The least-squares solution of the paper's section 3.2 and appendix C.4, for continuous steps.
    """
    inner = np.array([[_inner_product(a, b) for b in profiles] for a in profiles])
    target = np.array([_inner_product(a, wanted) for a in profiles])
    factors: list[float] = np.linalg.lstsq(inner, target, rcond=None)[0].tolist()
    return factors


def _inner_product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Return the integral over the steps of the product of two averages' weights.

    After n steps, step i has the weight (gamma + 1) i^gamma / n^(gamma + 1).
    """
    (steps_a, width_a), (steps_b, width_b) = a, b
    gamma_a, gamma_b, end = power_law_gamma(width_a), power_law_gamma(width_b), min(steps_a, steps_b)
    shares = (end / steps_a) ** (gamma_a + 1) * (end / steps_b) ** (gamma_b + 1)
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shares / end)
