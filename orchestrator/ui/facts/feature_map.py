"""The features of the data set in two dimensions: their first two principal components, by cluster."""

import csv
import functools
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ddm_core.artifacts import CorruptArtifact, read_json
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import require_inside
from orchestrator.ui.facts.samples import load_array

MAX_POINTS = 3000

BLOCK, ITERATIONS = 8, 8
"""Of the search for the principal components: axes that are followed, and steps."""

SHOWN_CLASSES = 4
"""Most frequent classes that are named of a cluster."""


def load_map(run: RunFolder, graph: Sequence[Stage]) -> dict[str, Any]:
    """Return `x` and `y` in [0, 1], `cluster` and `row` in the training shards of up to `MAX_POINTS` samples.

    `variance` is the share of the features' variance that the two dimensions show. Raises `RunFolderError` before the
    partition is finished.
    """
    by_kind = {stage.kind: stage for stage in graph}
    for kind in ("features", "partition"):
        if kind not in by_kind or not run.is_finished(by_kind[kind]):
            raise RunFolderError(f"the stage {kind} is not finished yet")
    folder = run.artifact(by_kind["features"])
    files = [folder / "features.npy", folder / "keys.txt", run.artifact(by_kind["partition"]) / "assignment.csv"]
    inside = tuple(require_inside(run, path) for path in files)
    return _compute_map(inside, tuple(path.stat().st_mtime_ns for path in inside))


@functools.lru_cache(maxsize=8)
def _compute_map(files: tuple[Path, ...], _changed: tuple[int, ...]) -> dict[str, Any]:
    """Return the map of features, keys and assignment; it is kept until one of these files changes."""
    features = load_array(files[0])
    if features.ndim != 2:
        raise CorruptArtifact(f"{files[0]} has shape {features.shape}, not one row for each image; run it again")
    rows = set(np.linspace(0, len(features) - 1, min(len(features), MAX_POINTS)).astype(int).tolist())
    with files[1].open(encoding="utf-8") as lines:
        keys = {line.rstrip("\n"): row for row, line in enumerate(lines) if row in rows}
    assignment = _read_assignment(files[2], keys)
    shown = [row for key, row in keys.items() if key in assignment]
    if len(shown) < 2:
        return {"x": [], "y": [], "cluster": [], "row": [], "variance": 0.0}
    places, variance = project(np.asarray(features[shown], np.float32))
    low, high = places.min(axis=0), places.max(axis=0)
    scaled = ((places - low) / np.maximum(high - low, 1e-12)).astype(float)
    return {
        "x": scaled[:, 0].round(4).tolist(),
        "y": scaled[:, 1].round(4).tolist(),
        "cluster": [assignment[key] for key in keys if key in assignment],
        "row": shown,
        "variance": variance,
    }


def load_classes(run: RunFolder, graph: Sequence[Stage]) -> dict[int, str]:
    """Return the most frequent classes of every cluster as text; empty without classes."""
    partition = next(stage for stage in graph if stage.kind == "partition")
    balance = read_json(run.verify_file(partition, "balance.json"))
    names, counts = balance.get("class_names") or [], balance.get("class_counts") or []
    texts = {}
    for k in range(len(counts[0]) if names and counts else 0):
        ranked = sorted(((row[k], name) for row, name in zip(counts, names, strict=True)), reverse=True)
        texts[k] = ", ".join(f"{name} {count:,}" for count, name in ranked[:SHOWN_CLASSES] if count)
    return texts


def project(
    features: Float32[np.ndarray, "count dimension"],
) -> tuple[Float32[np.ndarray, "count two"], float]:
    """Return the first two principal components of every row, and their share of the variance.

    Orthogonal iteration needs a few products with the features, a decomposition of all of them takes seconds.
    """
    centred = features - features.mean(axis=0)
    axes = np.random.default_rng(0).standard_normal((features.shape[1], min(BLOCK, features.shape[1])), np.float32)
    for _ in range(ITERATIONS):
        axes, _ = np.linalg.qr(centred.T @ (centred @ axes))
    block = centred @ axes
    _, _, turns = np.linalg.svd(block, full_matrices=False)
    places = np.zeros((len(features), 2), np.float32)
    places[:, : len(turns[:2])] = block @ turns[:2].T
    total = float((centred**2).sum())
    return places, float((places**2).sum() / total) if total else 0.0


def _read_assignment(path: Path, keys: Container[str]) -> dict[str, int]:
    """Return the clusters of these keys."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return {row["key"]: int(row["cluster_id"]) for row in csv.DictReader(file) if row["key"] in keys}
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise CorruptArtifact(f"{path} is damaged ({error}); delete its folder and run again") from error
