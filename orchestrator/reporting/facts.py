"""Contents of the report, read from the run folder: plain values, no HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_partition.shards.images import encode_png, tile_pixels
from data_partition.shards.shards import read_index, read_samples
from ddm_core.artifacts import CorruptArtifact, read_json
from orchestrator.pipeline.stage import Stage, expert_id
from orchestrator.reporting.analyses import finished_audits
from orchestrator.run.metrics_rows import is_number, sample_rows
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.trust import may_read_images

IMAGES_PER_CLUSTER = 24
"""How many images the report shows of a cluster."""

SHOWN_CLUSTERS = 16
"""With more clusters, the report shows images of the largest and the smallest ones only."""

CURVE_POINTS = 200
"""Points of a loss curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """One cluster: its size, some of its images, and how often its expert saw them."""

    cluster_id: int
    count: int
    share: float
    epochs: float | None
    """None while its expert is not finished."""
    picture: bytes | None
    """PNG of some of its images; None for a cluster of middle size among many, and without pictures."""


def load_clusters(run: RunFolder, graph: Sequence[Stage], *, with_pictures: bool = True) -> list[ClusterFacts]:
    """Return every cluster of the partition; pictures take long."""
    by_name = {stage.name: stage for stage in graph}
    folder = run.artifact(by_name["partition"]) / "clusters"
    counts = [read_index(folder / str(k)).count for k in range(len(list(folder.iterdir())))]
    by_size, half = sorted(range(len(counts)), key=lambda k: -counts[k]), SHOWN_CLUSTERS // 2
    shown = {*by_size[:half], *by_size[-half:]} if len(counts) > SHOWN_CLUSTERS else set(by_size)
    shown = shown if with_pictures else set()
    return [
        ClusterFacts(
            cluster_id=k,
            count=count,
            share=count / sum(counts),
            epochs=_epochs(run, by_name.get(f"expert_{k}")),
            picture=_picture(folder / str(k), count) if k in shown and may_read_images(run, folder / str(k)) else None,
        )
        for k, count in enumerate(counts)
    ]


def _epochs(run: RunFolder, expert: Stage | None) -> float | None:
    if expert is None or not run.is_finished(expert):
        return None
    return float(read_json(run.verify_file(expert, "training.json"))["epochs"])


def _picture(shards: Path, count: int) -> bytes:
    spread = islice(read_samples(shards), 0, None, max(1, count // IMAGES_PER_CLUSTER))
    images = np.stack([sample.image for sample in islice(spread, IMAGES_PER_CLUSTER)])
    return encode_png(tile_pixels(images, columns=IMAGES_PER_CLUSTER // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurves:
    """Losses of trainings by step."""

    points: Mapping[str, Sequence[tuple[float, float]]]
    """(step, loss) by name, in rising steps; trainings without steps are left out."""
    damaged: Sequence[str]
    """Names of the trainings whose rows differ from their checksum; what can be read of them is in `points`."""


def load_loss_curves(run: RunFolder, graph: Sequence[Stage], kinds: Sequence[str], figure: str = "loss") -> LossCurves:
    """Return some points of a figure of the metrics rows, of every finished training of these kinds."""
    points, damaged = {}, []
    for stage in graph:
        path = run.artifact(stage) / "metrics.jsonl"
        if stage.kind in kinds and run.is_finished(stage) and path.is_file():
            rows = sample_rows(path, CURVE_POINTS)
            points[stage.name] = [(row["step"], row[figure]) for row in rows if is_number(row.get(figure))]
            try:
                run.verify_file(stage, path.name)
            except CorruptArtifact:
                damaged.append(stage.name)
    return LossCurves(points={name: curve for name, curve in points.items() if curve}, damaged=damaged)


def load_missing_share(run: RunFolder, graph: Sequence[Stage], missing: Sequence[str]) -> float:
    """Return the share of the training images whose experts, such as `expert_3`, are missing."""
    partition = next(stage for stage in graph if stage.name == "partition")
    ids = [k for name in missing if (k := expert_id(name)) is not None]
    if not ids or not run.is_finished(partition):
        return 0.0
    shares = read_json(run.verify_file(partition, "balance.json"))["shares"]
    return float(sum(shares[k] for k in ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFacts:
    """Result and picture of an audit."""

    name: str
    """Its row in the table of scores."""
    result: dict[str, Any]
    """`audit.json`."""
    picture: bytes
    """PNG: suspects above, their nearest training images below."""


def load_audits(run: RunFolder, graph: Sequence[Stage]) -> list[AuditFacts]:
    """Return every finished audit."""
    return [
        AuditFacts(
            name=audit.name.removeprefix("audit_"),
            result=read_json(run.verify_file(audit, "audit.json")),
            picture=run.verify_file(audit, "suspects.png").read_bytes(),
        )
        for audit in finished_audits(run, graph)
    ]


def load_router_quality(run: RunFolder, graph: Sequence[Stage]) -> dict[str, Any] | None:
    """Return the router's held-out quality by t; None if the run has no finished router."""
    router = next((stage for stage in graph if stage.kind == "router" and run.is_finished(stage)), None)
    return None if router is None else dict(read_json(run.verify_file(router, "quality.json")))
