"""Time the stages before and after training on a few hundred images of the real source.

Three passes separate fixed costs from the cost per image: a cold one, a warm one, and one with twice as many images.
Work that grows faster than the number of images is underestimated for large data sets.
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
from ensemble.evaluation.reference import PROBE
from ensemble.evaluation.scoring import Reference, compare_clusters
from ensemble.evaluation.spaces import PIXELS
from experts.codec import Codec, encoder_folder
from experts.codecs.registry import CODECS, load_codec
from experts.config import CodecConfig
from experts.networks.latent_shapes import IMAGE_COMPONENTS
from experts.training.latents.folder import read_class_names
from experts.types import Images
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import STAGE_KINDS
from orchestrator.pipeline.stage_configs import dataset_config, latents_config
from orchestrator.planning.calibration import StageSpeed
from orchestrator.planning.microbenchmarks import ZERO_DURATION, Duration, duration_per_unit, measure
from orchestrator.planning.transfers import folder_bytes

MIN_IMAGES = 256
"""Images in the short passes."""
HELD_OUT = 0.2
"""Share of a pass's images that is held out; scores need some even if the run holds out fewer."""
DECODER_STEPS = (2, 8)
"""Steps of the codec's decoder in a pass, and in the longer fit from which the time of a step follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractorCost:
    """Cost of a feature extractor."""

    flops: float
    """Per image."""
    fit_flops: float
    """Per image of its fit."""
    dimension: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Results of a dry run."""

    speeds: dict[str, StageSpeed]
    """Per image, by kind of stage; `decoder` per image of its training step, `encode` per encoded training image."""
    latent_shape: tuple[int, ...]
    num_classes: int
    image_bytes: float
    """Per image in a shard."""
    latent_bytes: float
    """Per image in a folder of latents, with its text."""
    codec_bytes: int
    extractors: dict[str, ExtractorCost]
    """Of the partition and the scores, by name."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass through the stages."""

    durations: dict[str, Duration]
    counts: dict[str, int]
    """Images that each stage processed."""
    folder: Path


def dry_run(config: RunConfig, folder: Path) -> DryRun:
    """Run three passes and fit the speeds; raises what the stages raise."""
    count = max(MIN_IMAGES, 2 * config.codec.components if config.codec.kind in IMAGE_COMPONENTS else 0)
    cold, warm, long = (
        _run_pass(config, folder / name, images)
        for name, images in (("cold", count), ("warm", count), ("long", 2 * count))
    )
    speeds = {kind: _speed(kind, cold, warm, long) for kind in long.durations}
    if CODECS[config.codec.kind].probe is not None:
        speeds["decoder"] = _decoder_speed(config.codec, long)
    codec, dataset = long.folder / "codec", long.folder / "dataset" / "train"
    index = read_index(dataset)
    return DryRun(
        speeds=speeds,
        latent_shape=load_codec(codec).latent_shape,
        num_classes=len(read_class_names(long.folder / "partition" / "latents" / "0")),
        image_bytes=folder_bytes(dataset) / index.count,
        latent_bytes=folder_bytes(long.folder / "latents" / "train") / index.count,
        codec_bytes=folder_bytes(encoder_folder(codec)),
        extractors=_extractors(config, long.folder),
    )


def _run_pass(config: RunConfig, folder: Path, images: int) -> _Pass:
    """Run every stage once; `score` is the work of scores outside the networks."""
    scores = EvaluationConfig(num_samples=min(config.scores.num_samples, images), spaces=config.scores.spaces)
    scores = replace(scores, components=config.scores.components, neighbours=config.scores.neighbours)
    data = replace(dataset_config(config), limit=min(images, config.data.limit or images), holdout=HELD_OUT)
    partition = replace(config.partition, num_experts=min(2, config.partition.num_experts))
    folders = {name: folder / name for name in ("dataset", "codec", "latents", "features", "partition", "reference")}
    stages: list[tuple[str, Any, Mapping[str, Path]]] = [
        ("dataset", data, {}),
        ("codec", _with_decoder_steps(config.codec, DECODER_STEPS[0]), {"shards": folders["dataset"] / "train"}),
        (
            "latents",
            latents_config(config),
            {name: folders[name] for name in ("dataset", "codec")},
        ),
        ("features", partition, {"dataset": folders["dataset"]}),
        ("partition", partition, {name: folders[name] for name in ("dataset", "features", "latents")}),
        ("reference", scores, {"dataset": folders["dataset"], "codec": folders["codec"]}),
    ]
    durations = {kind: _time_stage(kind, stage_config, inputs, folder) for kind, stage_config, inputs in stages}
    codec = load_codec(folders["codec"])
    samples = np.stack(list(_read_images(folders["dataset"] / "train", scores.num_samples)))
    durations["score"] = measure(lambda: _score(codec, folders["reference"], folders["partition"], scores, samples))
    num_train, num_held_out = (read_index(folders["dataset"] / part).count for part in ("train", "holdout"))
    counts = dict.fromkeys(durations, num_train) | {"score": len(samples)}
    counts |= dict.fromkeys(("dataset", "latents", "reference"), num_train + num_held_out)
    return _Pass(durations, counts, folder)


def _time_stage(kind: str, config: object, inputs: Mapping[str, Path], folder: Path) -> Duration:
    """Run one stage with the function that the run itself calls."""
    out = folder / kind
    out.mkdir(parents=True)
    run, workspace = STAGE_KINDS[kind].run, Workspace.at(folder / "scratch" / kind)
    return measure(lambda: run(config, inputs, out, workspace))


def _score(codec: Codec, reference: Path, partition: Path, config: EvaluationConfig, images: Images) -> None:
    """Do everything that a score does with samples after their latents are generated."""
    codec.decode(torch.randn(len(images), *codec.latent_shape))
    real = Reference.load(reference, config)
    features = real.extract(images)
    for name in real.config.spaces:
        real.compare_space(name, features.spaces[name])
    real.compare_classes(features.spaces[PROBE])
    real.find_copies(features.spaces[PIXELS])
    compare_clusters(partition, images)


def _read_images(shards: Path, limit: int) -> Iterator[Pixels]:
    return (sample.image for sample in islice(read_samples(shards), limit))


def _with_decoder_steps(config: CodecConfig, steps: int) -> CodecConfig:
    return replace(config, decoder_training=replace(config.decoder_training, steps=steps))


def _speed(kind: str, cold: _Pass, warm: _Pass, long: _Pass) -> StageSpeed:
    """Fit a line through two sizes, or the origin if they are equal; the cold pass gives the first unit's cost."""
    count, added = warm.counts[kind], long.counts[kind] - warm.counts[kind]
    short, double = warm.durations[kind], long.durations[kind]
    unit = duration_per_unit(short, double, added) if added else duration_per_unit(ZERO_DURATION, short, count)
    fixed_s = max(0.0, short.wall_s - unit.wall_s * count)
    once_s = fixed_s + max(0.0, cold.durations[kind].wall_s - short.wall_s)
    return StageSpeed(unit_s=unit.wall_s, cpu_s=unit.cpu_s, once_s=once_s)


def _decoder_speed(config: CodecConfig, last_pass: _Pass) -> StageSpeed:
    """Measure the decoder's training from two fits of the codec with different numbers of steps."""
    folder, inputs = last_pass.folder / "decoder", {"shards": last_pass.folder / "dataset" / "train"}
    short, long = (
        _time_stage("codec", _with_decoder_steps(config, steps), inputs, folder / str(steps)) for steps in DECODER_STEPS
    )
    images = (DECODER_STEPS[1] - DECODER_STEPS[0]) * config.decoder_training.batch_size
    unit = duration_per_unit(short, long, images)
    return StageSpeed(unit_s=unit.wall_s, cpu_s=unit.cpu_s)


def _extractors(config: RunConfig, folder: Path) -> dict[str, ExtractorCost]:
    """Load the costs of the extractors: `partition`, and `score/<name>` per feature space."""
    spaces = [name for name in (*config.scores.spaces, PROBE) if name != PIXELS]
    folders = {"partition": folder / "features" / "extractor"}
    folders |= {f"score/{name}": folder / "reference" / "extractors" / name for name in spaces}
    loaded = {name: load_extractor(path) for name, path in folders.items()}
    return {
        name: ExtractorCost(
            flops=extractor.flops_per_image, fit_flops=extractor.fit_flops_per_image, dimension=extractor.dimension
        )
        for name, extractor in loaded.items()
    }
