"""Every compressed ensemble that a run has made so far: what each weighs, costs and is worth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ddm_core.artifacts import Manifest, is_finished, read_json, read_manifest
from ensemble.compression.measurement import REPORT_FILE, TIMING_FILE, CompressionReport
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

MEASURES = ("bytes", "flops", "cpu", "kid", "fd", "l2")
"""What a budget may bound; all but the relative L2 distance are ratios to the whole ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPoint:
    """One compressed ensemble."""

    name: str
    """Its stages, in their order."""
    folder: Path
    bytes: float
    """On disk, over the whole ensemble's."""
    flops: float
    """Of an image, over the whole ensemble's."""
    l2: float
    """Relative L2 distance to the whole ensemble's images from the same noise."""
    cpu: float | None
    """Processor time of an image over the whole ensemble's; None if it was not measured."""
    kid: float | None
    """KID over the whole ensemble's, in the space where that is larger; None without a score."""
    fd: float | None
    """The same of the Fréchet distance."""

    def dominates(self, other: "CompressionPoint") -> bool:
        """Whether it is nowhere worse in bytes, processor time (or FLOPs) and KID (or L2), and somewhere better."""
        ours, theirs = self._costs(), other._costs()
        return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs

    def _costs(self) -> tuple[float, float, float]:
        return (
            self.bytes,
            self.flops if self.cpu is None else self.cpu,
            1 + self.l2 if self.kid is None else self.kid,
        )


def compression_points(run: RunFolder, graph: Sequence[Stage]) -> list[CompressionPoint]:
    """Every compressed version of the run's ensemble, the heaviest first."""
    by_name = {stage.name: stage for stage in graph}
    default = next((stage for stage in graph if stage.kind == "score"), None)
    if "ensemble" not in by_name or default is None or not run.finished(default):
        return []
    whole, score = by_name["ensemble"].fingerprint, read_manifest(run.artifact(default))
    baseline = read_json(run.artifact(default) / "scores.json")
    found = dict(_finished(run))
    points = [
        _point(folder, manifest, found, score, baseline)
        for folder, manifest in found.items()
        if (folder / REPORT_FILE).exists() and manifest.inputs.get("whole") == whole
    ]
    return sorted(points, key=lambda point: -point.bytes)


def front_of(points: Sequence[CompressionPoint]) -> list[CompressionPoint]:
    """Those that no other dominates."""
    return [point for point in points if not any(other.dominates(point) for other in points)]


def pareto_table(points: Sequence[CompressionPoint]) -> Table:
    """For a terminal; the front is bold."""
    table, front = Table(title="Compressed ensembles, as ratios to the whole one"), front_of(points)
    for heading in ("", "bytes", "FLOPs", "CPU time", "KID", "FD", "relative L2"):
        table.add_column(heading, justify="right" if heading else "left")
    for point in points:
        values = (point.bytes, point.flops, point.cpu, point.kid, point.fd, point.l2)
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        table.add_row(point.name, *cells, style="bold" if point in front else None)
    return table


def _finished(run: RunFolder) -> Iterator[tuple[Path, Manifest]]:
    folder = run.root / "artifacts"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_finished(path):
            yield path, read_manifest(path)


def _point(
    folder: Path, manifest: Manifest, found: dict[Path, Manifest], score: Manifest, baseline: dict[str, Any]
) -> CompressionPoint:
    compared = CompressionReport.read(folder / REPORT_FILE)
    behind = {path: one for path, one in found.items() if one.inputs.get("ensemble") == manifest.fingerprint}
    scores = [read_json(path / "scores.json") for path, one in behind.items() if one.config == score.config]
    timings = [read_json(path / TIMING_FILE) for path in behind if (path / TIMING_FILE).exists()]
    return CompressionPoint(
        name=" + ".join(compared.stages),
        folder=folder,
        bytes=compared.bytes_after / compared.bytes_before,
        flops=compared.flops_after / compared.flops_before,
        l2=compared.relative_l2,
        cpu=timings[-1]["ratio"] if timings else None,
        kid=_worst(scores, baseline, "kid"),
        fd=_worst(scores, baseline, "fd"),
    )


def _worst(scores: Sequence[dict[str, Any]], baseline: dict[str, Any], key: str) -> float | None:
    if not scores:
        return None
    ours, theirs = scores[-1]["spaces"], baseline["spaces"]
    return max(float(ours[space][key]) / float(theirs[space][key]) for space in theirs)
