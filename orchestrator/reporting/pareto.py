"""Size, cost and quality of every compressed ensemble that a run has so far."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ddm_core.artifacts import Manifest, is_finished, read_json, read_manifest
from ensemble.compression.report import REPORT_FILE, TIMING_FILE, CompressionReport
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

MEASURES = ("bytes", "flops", "memory", "cpu", "kid", "fd", "l2")
"""Quantities that a budget may limit; all but the relative L2 distance are ratios to the original ensemble."""

MAX_KID_RATIO = 1.2
"""A compression with a larger KID, relative to the original ensemble's, has lost too much quality to be highlighted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPoint:
    """One compressed ensemble."""

    name: str
    """Its compression methods, in order."""
    folder: Path
    bytes: float
    """On disk, relative to the original ensemble."""
    flops: float
    """Per image, relative to the original ensemble."""
    memory: float
    """Peak bytes of tensors in the largest request, relative to the original ensemble's."""
    l2: float
    """Relative L2 distance to the original ensemble's images from the same noise."""
    cpu: float | None
    """CPU time per image, relative to the original ensemble; None if it was not measured."""
    kid: float | None
    """KID relative to the original ensemble, in the space where that is larger; None without a score."""
    fd: float | None
    """The same for the Fréchet distance."""

    def dominates(self, other: "CompressionPoint") -> bool:
        """Return whether it is nowhere worse in bytes, CPU time (or FLOPs) and KID (or L2), and somewhere better."""
        ours, theirs = self._costs(), other._costs()
        return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs

    def _costs(self) -> tuple[float, float, float]:
        return (
            self.bytes,
            self.flops if self.cpu is None else self.cpu,
            1 + self.l2 if self.kid is None else self.kid,
        )


def load_compression_points(run: RunFolder, graph: Sequence[Stage]) -> list[CompressionPoint]:
    """Return every compressed version of the run's ensemble, the largest first."""
    by_name = {stage.name: stage for stage in graph}
    default = next((stage for stage in graph if stage.kind == "score"), None)
    if "ensemble" not in by_name or default is None or not run.is_finished(default):
        return []
    original, score = by_name["ensemble"].fingerprint, read_manifest(run.artifact(default))
    baseline = read_json(run.artifact(default) / "scores.json")
    manifests = dict(_finished_artifacts(run))
    points = [
        _load_point(folder, manifest, manifests, score, baseline)
        for folder, manifest in manifests.items()
        if (folder / REPORT_FILE).exists() and manifest.inputs.get("original") == original
    ]
    return sorted(points, key=lambda point: -point.bytes)


def pareto_front(points: Sequence[CompressionPoint]) -> list[CompressionPoint]:
    """Return the points that no other dominates."""
    return [point for point in points if not any(other.dominates(point) for other in points)]


def select_good(points: Sequence[CompressionPoint]) -> list[CompressionPoint]:
    """Return the points of the Pareto front whose KID is known and close to the original ensemble's."""
    return [point for point in pareto_front(points) if point.kid is not None and point.kid <= MAX_KID_RATIO]


def pareto_table(points: Sequence[CompressionPoint]) -> Table:
    """Return a table for a terminal; what `select_good` selects is bold."""
    table, good = Table(title="Compressed ensembles, as ratios to the original"), select_good(points)
    for heading in ("", "bytes", "FLOPs", "memory", "CPU time", "KID", "FD", "relative L2"):
        table.add_column(heading, justify="right" if heading else "left")
    for point in points:
        values = (point.bytes, point.flops, point.memory, point.cpu, point.kid, point.fd, point.l2)
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        table.add_row(Text(point.name), *cells, style="bold" if point in good else None)
    return table


def _finished_artifacts(run: RunFolder) -> Iterator[tuple[Path, Manifest]]:
    folder = run.root / "artifacts"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_finished(path):
            yield path, read_manifest(path)


def _load_point(
    folder: Path, manifest: Manifest, manifests: dict[Path, Manifest], score: Manifest, baseline: dict[str, Any]
) -> CompressionPoint:
    report = CompressionReport.read(folder / REPORT_FILE)
    dependents = {
        path: other for path, other in manifests.items() if other.inputs.get("ensemble") == manifest.fingerprint
    }
    scores = [read_json(path / "scores.json") for path, other in dependents.items() if other.config == score.config]
    timings = [read_json(path / TIMING_FILE) for path in dependents if (path / TIMING_FILE).exists()]
    return CompressionPoint(
        name=" + ".join(report.stages),
        folder=folder,
        bytes=report.bytes_after / report.bytes_before,
        flops=report.flops_after / report.flops_before,
        memory=report.memory_ratio,
        l2=report.relative_l2,
        cpu=timings[-1]["ratio"] if timings else None,
        kid=_largest_ratio(scores, baseline, "kid"),
        fd=_largest_ratio(scores, baseline, "fd"),
    )


def _largest_ratio(scores: Sequence[dict[str, Any]], baseline: dict[str, Any], key: str) -> float | None:
    if not scores:
        return None
    ours, theirs = scores[-1]["spaces"], baseline["spaces"]
    known = [space for space in theirs if theirs[space][key] is not None and theirs[space][key] > 0]
    return max((float(ours[space][key]) / float(theirs[space][key]) for space in known), default=None)
