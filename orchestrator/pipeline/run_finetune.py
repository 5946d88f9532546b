"""Train LoRA adapters of a finished run's experts on a folder of images, one expert after the other, each alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_partition.datasets.notices import Notices
from data_partition.datasets.sources import SOURCES
from data_partition.errors import NoSamples
from data_partition.partition import load_partition
from data_partition.shards.images import fit_image
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace, read_json
from ddm_core.json_values import from_json
from experts.codecs.registry import load_codec
from experts.conditions.text_encoder import TextEncoder
from experts.config import TrainingConfig
from experts.expert import ExpertSummary
from experts.training.lora_training import train_lora
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError

WORK = "work"
"""Folder of the images and of the checkpoints, below that of the adapters."""
ALL, ROUTED = "all", "routed"
SUMMARY = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRequest:
    """What to train, on what, and where to."""

    config: RunConfig
    ensemble: Path
    partition: Path
    images: Path
    out: Path
    experts: str
    """`all`, `routed`, or ids such as `0,2`."""
    training: TrainingConfig
    rank: int


def finetune(request: FinetuneRequest) -> Iterator[tuple[int, ExpertSummary]]:
    """Train the adapters, and yield each expert's id and summary; what is finished is not trained again.

    Images are cropped to the run's size, and have no classes, since a folder may have others than the run. Raises
    `ConfigError` for ids that are not there, `NoSamples` for a folder without images, and what `train_lora` raises.
    """
    chosen = _choose(request)
    shards = _write_shards(request, chosen)
    text = TextEncoder.from_config(request.config.text)
    for k, folder in shards.items():
        workspace = Workspace.at(request.out / WORK / f"expert_{k}")
        expert, codec = request.ensemble / f"expert_{k}", request.ensemble / "codec"
        out = request.out / f"expert_{k}"
        if (out / SUMMARY).is_file():
            yield k, from_json(ExpertSummary, read_json(out / SUMMARY))
            continue
        yield (
            k,
            train_lora(
                expert, [folder], load_codec(codec), codec, request.training, request.rank, out, workspace, text
            ),
        )


def _choose(request: FinetuneRequest) -> list[int]:
    present = sorted(int(path.name.removeprefix("expert_")) for path in request.ensemble.glob("expert_*"))
    if request.experts in (ALL, ROUTED):
        return present
    ids = [part.strip() for part in request.experts.split(",")]
    if unknown := [part for part in ids if not part.isdigit() or int(part) not in present]:
        known = ", ".join(map(str, present))
        raise ConfigError(f"--experts must be {ALL}, {ROUTED}, or ids among {known}; got {unknown[0]!r}")
    return sorted({int(part) for part in ids})


def _write_shards(request: FinetuneRequest, chosen: list[int]) -> Mapping[int, Path]:
    """Write the images as shards, all into one folder or each into that of its cluster; return those of each expert."""
    data = replace(request.config.data, source="image_folder", path=str(request.images), fit="crop", labels=False)
    partition = load_partition(request.partition) if request.experts == ROUTED else None
    shape = (data.image_size, data.image_size, data.channels)
    folders = {k: request.out / WORK / (f"images_{k}" if partition else "images") for k in chosen}
    writers = {folder: ShardWriter(folder, data.shard_samples, image_shape=shape) for folder in set(folders.values())}
    notices = Notices()
    for sample in notices.readable(SOURCES[data.source](data).train()):
        fitted: Sample = replace(sample, label=-1, image=fit_image(sample.image, data, sample.name), source=None)
        k = chosen[0] if partition is None else int(partition.assign_images(fitted.image[None])[0])
        if k in folders:
            writers[folders[k]].add(fitted)
    counts = {folder: writer.close().count for folder, writer in writers.items()}
    if not any(counts.values()):
        there = "; ".join(notices.texts()) or "nothing is there"
        raise NoSamples(f"--images {request.images} gave no image for experts {chosen}: {there}; check the folder")
    return {k: folder for k, folder in folders.items() if counts[folder]}
