"""The stages before and after training, done for real on a few hundred images of the real source, and timed.

Three times: cold, again, and with twice as many images. So what is done once, and what each image adds, come apart.
What grows faster than the number of images is underestimated for large data sets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_partition.features.extract import load_extractor
from data_partition.shards.images import Pixels
from data_partition.shards.shards import read_index, read_samples
from ddm_core.artifacts import Workspace
from ensemble.config import EvaluationConfig
from ensemble.evaluation.scoring import Reference, score_clusters
from experts.codec import Codec, Images
from experts.codecs.registry import load_codec
from experts.config import CodecConfig
from experts.training.latent_dataset import encode_latents
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.stage_kinds import STAGE_KINDS
from orchestrator.planning.calibration import StageSpeed
from orchestrator.planning.microbenchmarks import NOTHING, Duration, measure, per_unit
from orchestrator.planning.transfers import folder_bytes

LEAST_IMAGES = 256
"""In the short walks."""
HELD_OUT = 0.2
"""Share of a rehearsal's images that is held out: a score needs some, however few the run itself keeps."""
DECODER_STEPS = (2, 8)
"""Steps of the codec's decoder in a rehearsal, and in the one that tells what a step takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractorCost:
    """What an extractor of features costs."""

    flops: float
    """For one image."""
    fit_flops: float
    """For each image that it is fitted on."""
    dimension: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What was found out."""

    speeds: dict[str, StageSpeed]
    """By kind of stage, for each image; `decoder` for each image of a training step, `encode` for an expert's."""
    latent_shape: tuple[int, ...]
    num_classes: int
    image_bytes: float
    """Of one image in a shard."""
    codec_bytes: int
    extractors: dict[str, ExtractorCost]
    """Of the partition and of the scores, by name."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """One walk through the stages."""

    taken: dict[str, Duration]
    counts: dict[str, int]
    """Images that each of them was about."""
    folder: Path


def dry_run(config: RunConfig, folder: Path) -> DryRun:
    """Walk three times; raises what the stages themselves would raise."""
    few = max(LEAST_IMAGES, 0 if config.codec.kind == "pixels" else 2 * config.codec.components)
    cold, warm, long = (
        _walk(config, folder / name, images) for name, images in (("cold", few), ("warm", few), ("long", 2 * few))
    )
    speeds = {kind: _speed(kind, cold, warm, long) for kind in long.taken}
    if config.codec.kind == "pca_conv":
        speeds["decoder"] = _decoder_speed(config.codec, long)
    codec, dataset = long.folder / "codec", long.folder / "dataset" / "train"
    index = read_index(dataset)
    return DryRun(
        speeds=speeds,
        latent_shape=load_codec(codec).latent_shape,
        num_classes=len(index.class_names),
        image_bytes=folder_bytes(dataset) / index.count,
        codec_bytes=folder_bytes(codec),
        extractors=_extractors(config, long.folder),
    )


def _walk(config: RunConfig, folder: Path, images: int) -> _Turn:
    """Every stage once, in order; `encode` and `score` are what trainings and scores do besides the networks."""
    scores = EvaluationConfig(num_samples=min(config.scores.num_samples, images), spaces=config.scores.spaces)
    scores = replace(scores, components=config.scores.components, neighbours=config.scores.neighbours)
    data = replace(config.data, limit=min(images, config.data.limit or images), holdout=HELD_OUT)
    partition = replace(config.partition, num_experts=min(2, config.partition.num_experts))
    at = {name: folder / name for name in ("dataset", "codec", "features", "partition", "reference")}
    plans: list[tuple[str, Any, Mapping[str, Path]]] = [
        ("dataset", data, {}),
        ("codec", _short(config.codec, DECODER_STEPS[0]), {"shards": at["dataset"] / "train"}),
        ("features", partition, {"dataset": at["dataset"]}),
        ("partition", partition, {"dataset": at["dataset"], "features": at["features"]}),
        ("reference", scores, {"dataset": at["dataset"]}),
    ]
    taken = {kind: _run(kind, chosen, inputs, folder) for kind, chosen, inputs in plans}
    codec, workspace = load_codec(at["codec"]), Workspace.at(folder / "scratch" / "encode")
    taken["encode"] = measure(lambda: encode_latents([at["dataset"] / "train"], codec, at["codec"], workspace))
    samples = np.stack(list(_images(at["dataset"] / "train", scores.num_samples)))
    taken["score"] = measure(lambda: _score(codec, at["reference"], at["partition"], scores, samples))
    count, held_out = (read_index(at["dataset"] / part).count for part in ("train", "holdout"))
    both = dict.fromkeys(("dataset", "reference"), count + held_out)
    return _Turn(taken, dict.fromkeys(taken, count) | both | {"score": len(samples)}, folder)


def _run(kind: str, config: object, inputs: Mapping[str, Path], folder: Path) -> Duration:
    """One stage by the function that the run itself would call."""
    out = folder / kind
    out.mkdir(parents=True)
    workspace = Workspace.at(folder / "scratch" / kind)
    return measure(lambda: STAGE_KINDS[kind].run(config, inputs, out, workspace))


def _score(codec: Codec, reference: Path, partition: Path, config: EvaluationConfig, images: Images) -> None:
    """All that is done with samples once their latents are drawn."""
    codec.decode(torch.randn(len(images), *codec.latent_shape))
    real = Reference.load(reference, config)
    found = real.extract(images)
    for name in real.config.spaces:
        real.score_space(name, found.spaces[name])
    real.score_classes(found.spaces["pixels"])
    real.nearest_ratio(found.spaces["pixels"])
    score_clusters(partition, images)


def _images(shards: Path, most: int) -> Iterator[Pixels]:
    return (sample.image for sample in islice(read_samples(shards), most))


def _short(config: CodecConfig, steps: int) -> CodecConfig:
    return replace(config, decoder_training=replace(config.decoder_training, steps=steps))


def _speed(kind: str, cold: _Turn, warm: _Turn, long: _Turn) -> StageSpeed:
    """A straight line through two sizes, or through the origin if there are no more; and what was slow at first."""
    count, more = warm.counts[kind], long.counts[kind] - warm.counts[kind]
    unit = per_unit(warm.taken[kind], long.taken[kind], more) if more else per_unit(NOTHING, warm.taken[kind], count)
    fixed_s = max(0.0, warm.taken[kind].wall_s - unit.wall_s * count)
    once_s = fixed_s + max(0.0, cold.taken[kind].wall_s - warm.taken[kind].wall_s)
    return StageSpeed(unit_s=unit.wall_s, cpu_s=unit.cpu_s, once_s=once_s)


def _decoder_speed(config: CodecConfig, turn: _Turn) -> StageSpeed:
    """From fitting the codec with a few more steps."""
    folder, inputs = turn.folder / "decoder", {"shards": turn.folder / "dataset" / "train"}
    took = [_run("codec", _short(config, steps), inputs, folder / str(steps)) for steps in DECODER_STEPS]
    images = (DECODER_STEPS[1] - DECODER_STEPS[0]) * config.decoder_training.batch_size
    unit = per_unit(took[0], took[1], images)
    return StageSpeed(unit_s=unit.wall_s, cpu_s=unit.cpu_s)


def _extractors(config: RunConfig, folder: Path) -> dict[str, ExtractorCost]:
    """Of the partition under its own name, of the scores under `score/<name>`."""
    spaces = dict.fromkeys((*config.scores.spaces, "pixels"))
    folders = {"partition": folder / "features" / "extractor"}
    folders |= {f"score/{name}": folder / "reference" / "extractors" / name for name in spaces}
    loaded = {name: load_extractor(path) for name, path in folders.items()}
    return {
        name: ExtractorCost(flops=one.flops_per_image, fit_flops=one.fit_flops_per_image, dimension=one.dimension)
        for name, one in loaded.items()
    }
