"""The trajectories that a score keeps: previews on the way from noise to an image, and the experts that draw it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data_partition.shards.images import encode_png
from ddm_core.artifacts import CorruptArtifact
from ensemble.config import TRAJECTORIES
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import require_inside

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP, STRIP = 760, 270, 46, 12, 70, 10, 16
"""SVG units: of the chart of the gates, of its margins, and of the strip with the gates of the selection."""

MAX_LAYERS, LEAST = 12, 0.01
"""Experts with an area of their own, and the largest probability that each of them reaches at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One picture of a film strip: the clean prediction at t, or at t = 0 the image."""

    t: float
    src: str
    experts: list[tuple[int, float]]
    """Experts with a gate, the largest first; empty for the image, and for a model of one expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The probability of one expert over t, as an area of the chart."""

    expert: int | None
    """None for all that have no area of their own."""
    area: str
    """Points of a polygon."""
    bars: list[tuple[float, float, float, float]]
    """x, y, width and height of its gates in the strip."""
    probabilities: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateChart:
    """p(k | noised, t, condition) over t, stacked, above the gates that the selection made of it."""

    layers: list[Layer]
    times: list[float]
    ticks: list[tuple[float, str]]


Film = tuple[int, list[Frame], GateChart | None]
"""Seed, pictures and gates of a trajectory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """What `write_trajectories` wrote."""

    seeds: Int64[np.ndarray, " seed"]
    times: Float32[np.ndarray, " time"]
    shown: Int64[np.ndarray, " shown"]
    gates: Float32[np.ndarray, "seed time expert"]
    posterior: Float32[np.ndarray, "seed time expert"]
    frames: UInt8[np.ndarray, "seed frame height width channel"]

    def __post_init__(self) -> None:
        """Raise `ValueError` unless the arrays fit together."""
        seeds, times, shown = len(self.seeds), len(self.times), len(self.shown)
        expected = (seeds, times), (seeds, times), (seeds, shown + 1)
        arrays = self.gates, self.posterior, self.frames
        ranks = [array.ndim for array in (self.seeds, self.times, self.shown, *arrays)]
        if ranks != [1, 1, 1, 3, 3, 5] or any(a.shape[:2] != e for a, e in zip(arrays, expected, strict=True)):
            raise ValueError("its arrays have other shapes")
        if self.frames.dtype != np.uint8 or not all(0 <= place < times for place in self.shown):
            raise ValueError("it has other frames")

    def _row(self, seed: int) -> int:
        rows = np.flatnonzero(self.seeds == seed)
        if not len(rows):
            raise RunFolderError(f"the trajectory of seed {seed} is not kept, only those of {self.seeds.tolist()}")
        return int(rows[0])

    def png(self, seed: int, frame: int) -> bytes:
        """Encode one picture, -1 the last; raises `RunFolderError` if there is none."""
        if not -1 <= frame < self.frames.shape[1]:
            raise RunFolderError(f"a trajectory of this score has {self.frames.shape[1]} pictures, and none is {frame}")
        return encode_png(np.ascontiguousarray(self.frames[self._row(seed), frame]))

    def films(self, src: Callable[[int, int], str], most: int | None = None) -> list[Film]:
        """Return some trajectories; `src` returns the address of a picture from the seed and its number."""
        return [(seed, self._film(seed, src), self._draw_gates(seed)) for seed in self.seeds.tolist()[:most]]

    def _film(self, seed: int, src: Callable[[int, int], str]) -> list[Frame]:
        row, frames = self._row(seed), []
        for frame, place in enumerate(self.shown):
            gates = sorted(enumerate(self.gates[row, place].tolist()), key=lambda pair: -pair[1])
            experts = [(k, gate) for k, gate in gates if gate > 0 and len(gates) > 1]
            frames.append(Frame(t=float(self.times[place]), src=src(seed, frame), experts=experts))
        return [*frames, Frame(t=0.0, src=src(seed, len(frames)), experts=[])]

    def _draw_gates(self, seed: int) -> GateChart | None:
        """Draw the probabilities of a trajectory from t = 1 on the left; None for a single expert or a single t."""
        row = self._row(seed)
        posterior, gates = self.posterior[row].astype(float), self.gates[row].astype(float)
        if posterior.shape[1] == 1 or len(self.times) == 1:
            return None
        largest = sorted(range(posterior.shape[1]), key=lambda k: -posterior[:, k].max())
        own = sorted(k for k in largest[:MAX_LAYERS] if posterior[:, k].max() >= LEAST)
        rest = [k for k in largest if k not in own]
        groups: list[tuple[int | None, list[int]]] = [(k, [k]) for k in own]
        groups += [(None, rest)] if rest else []
        xs = [_place(float(t)) for t in self.times]
        edges = [*xs, _place(0.0)]  # the gates of an evaluation hold until the next one
        layers, below, strip = [], np.zeros(len(xs)), np.zeros(len(xs))
        for expert, members in groups:
            values, shares = posterior[:, members].sum(1), gates[:, members].sum(1)
            upper, lower = ([(x, _height(y)) for x, y in zip(xs, ys, strict=True)] for ys in (below + values, below))
            bars = [
                (edges[i], HEIGHT - BOTTOM + 8 + STRIP * strip[i], edges[i + 1] - edges[i], STRIP * shares[i])
                for i in np.flatnonzero(shares > 0)
            ]
            area = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
            layers.append(Layer(expert=expert, area=area, bars=bars, probabilities=values.tolist()))
            below, strip = below + values, strip + shares
        ticks = [(_place(t), f"{t:g}") for t in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)]
        return GateChart(layers=layers, times=self.times.tolist(), ticks=ticks)


def load_trajectories(run: RunFolder, stage: Stage) -> Trajectories | None:
    """Read the trajectories of a finished score; None for a score of an older version, which kept none.

    Raises `CorruptArtifact` if the file is damaged.
    """
    path = run.artifact(stage) / TRAJECTORIES
    if stage.kind != "score" or not run.is_finished(stage) or not path.is_file():
        return None
    inside = require_inside(run, path)
    return _load(inside, inside.stat().st_mtime_ns)


def explain_absence(run: RunFolder, stage: Stage, kept: Trajectories | None) -> str:
    """Return which trajectories a score keeps, or for one of an older version how to get some."""
    if kept is not None:
        return f"The score {stage.name} keeps the trajectories of seeds {', '.join(map(str, kept.seeds.tolist()))}."
    return (
        f"The score {stage.name} is of an older version, which kept no trajectories. Delete the folder "
        f"`{run.artifact(stage)}`; `ddm resume {run.root}` then computes this score again, with them."
    )


@functools.lru_cache(maxsize=8)
def _load(path: Path, _changed: int) -> Trajectories:
    try:
        return Trajectories(**load_file(path))
    except (SafetensorError, ValueError, TypeError) as error:
        raise CorruptArtifact(f"{path} is damaged ({error}); delete its folder and run again") from error


def _place(t: float) -> float:
    return LEFT + (1 - t) * (WIDTH - LEFT - RIGHT)


def _height(probability: float) -> float:
    return TOP + (1 - min(1.0, probability)) * (HEIGHT - TOP - BOTTOM)
