"""The features of the data set in two dimensions: their first two principal components, by cluster."""

import csv
from collections.abc import Sequence
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
    features = load_array(require_inside(run, folder / "features.npy"))
    keys = require_inside(run, folder / "keys.txt").read_text(encoding="utf-8").split("\n")
    assignment = _read_assignment(require_inside(run, run.artifact(by_kind["partition"]) / "assignment.csv"))
    if features.ndim != 2 or len(features) > len(keys):
        raise CorruptArtifact(f"{folder} has features of shape {features.shape} for {len(keys)} keys; run it again")
    rows = np.unique(np.linspace(0, len(features) - 1, min(len(features), MAX_POINTS)).astype(int))
    shown = [int(row) for row in rows if keys[row] in assignment]
    if len(shown) < 2:
        return {"x": [], "y": [], "cluster": [], "row": [], "variance": 0.0}
    places, variance = project(np.asarray(features[shown], np.float32))
    low, high = places.min(axis=0), places.max(axis=0)
    scaled = ((places - low) / np.maximum(high - low, 1e-12)).astype(float)
    return {
        "x": scaled[:, 0].round(4).tolist(),
        "y": scaled[:, 1].round(4).tolist(),
        "cluster": [assignment[keys[row]] for row in shown],
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


def _read_assignment(path: Path) -> dict[str, int]:
    """Return the cluster of every key."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return {row["key"]: int(row["cluster_id"]) for row in csv.DictReader(file)}
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise CorruptArtifact(f"{path} is damaged ({error}); delete its folder and run again") from error
