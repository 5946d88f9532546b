"""What an expert drew while it trained: a picture for each validated step, and its distance from held-out images."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.pipeline.stage import FIRST_SAMPLES, VALIDATION, Stage
from orchestrator.run.metrics_rows import is_number, sample_rows
from orchestrator.run.run_folder import RunFolder

MAX_ROWS = 256
"""Rows that are read of a file of distances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """The pictures that an expert drew at a step, and their distance from held-out images."""

    step: int
    """0 stands for the first checkpoint in older runs."""
    picture: Path
    kid: tuple[float, float] | None = None
    """Kernel distance and its standard error; None: not measured."""

    @property
    def label(self) -> str:
        """Return step and distance as text."""
        step = f"step {self.step:,}" if self.step else "first checkpoint"
        return step if self.kid is None else f"{step}, KID {self.kid[0]:.3f} ± {self.kid[1]:.3f}"


def find_step_samples(run: RunFolder, stage: Stage) -> dict[int, StepSamples]:
    """Return what an expert drew while it trained, by step; of equal steps that of the latest attempt."""
    attempts, pictures, distances = run.attempts(stage), dict[int, Path](), dict[int, tuple[float, float]]()
    for attempt in attempts:
        for path in attempt.glob("samples-*.png"):
            if (step := path.stem.removeprefix("samples-")).isdecimal():
                pictures[int(step)] = path
        distances |= _read_distances(attempt / VALIDATION)
    if not pictures and attempts and (old := attempts[-1] / FIRST_SAMPLES).is_file():
        pictures[0] = old
    return {
        step: StepSamples(step=step, picture=path, kid=distances.get(step)) for step, path in sorted(pictures.items())
    }


def _read_distances(path: Path) -> dict[int, tuple[float, float]]:
    """Return the distances of a file by step; a damaged row is left out."""
    if path.is_symlink() or not path.is_file():
        return {}
    rows = [row for row in sample_rows(path, MAX_ROWS) if is_number(row.get("kid")) and is_number(row.get("kid_std"))]
    return {row["step"]: (row["kid"], row["kid_std"]) for row in rows}
