"""The stages of `ddm finetune`: images of one's own as latents, and a LoRA adapter of an expert on some of them."""

import shutil
from dataclasses import replace
from pathlib import Path

from data_partition.datasets.build import NO_CAPTION
from data_partition.datasets.notices import Notices
from data_partition.datasets.sources import SOURCES
from data_partition.errors import NoSamples
from data_partition.partition import load_partition
from data_partition.shards.images import fit_image
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import CACHE, Workspace, read_json, write_json
from experts.codecs.registry import load_codec, stored_type
from experts.conditions.text_encoder import TextEncoder
from experts.training.latents.encode import encode_folder
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.lora_training import train_lora
from experts.training.trainer import check_device
from orchestrator.config.finetune import ALL_IMAGES, AdapterImagesStageConfig, AdapterStageConfig
from orchestrator.pipeline.stage_inputs import Inputs

COUNT_FILE, SUMMARY = "count.json", "training.json"


def run_adapter_images(config: AdapterImagesStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Crop the images to the run's size, divide them among the experts by cluster, or keep all, and encode them.

    An expert without images gets an empty folder. Raises `NoSamples` if no expert gets any.
    """
    shards = _write_shards(config, inputs, workspace)
    text, device = TextEncoder.from_config(config.text), check_device(config.device)
    codec = FrozenCodec.open(inputs["codec"], load_codec(inputs["codec"]), device, stored_type(inputs["codec"]))
    for name, folder in shards.items():
        (out / name).mkdir(parents=True)
        count = encode_folder(folder, codec, text and text.to(device), out / name, workspace)
        write_json(out / name / COUNT_FILE, count)
    return 0.0


def _write_shards(config: AdapterImagesStageConfig, inputs: Inputs, workspace: Workspace) -> dict[str, Path]:
    """Write the images as shards below the scratch folder, and return the folder of each expert or that of all."""
    data, partition = config.data, load_partition(inputs["partition"]) if config.experts else None
    scratch = workspace.scratch / CACHE / "images"
    shutil.rmtree(scratch, ignore_errors=True)
    shape = (data.image_size, data.image_size, data.channels)
    names = [str(k) for k in config.experts] or [ALL_IMAGES]
    writers = {name: ShardWriter(scratch / name, data.shard_samples, image_shape=shape) for name in names}
    notices = Notices()
    for sample in notices.readable(SOURCES[data.source](data).train()):
        fitted: Sample = replace(sample, label=-1, image=fit_image(sample.image, data, sample.name), source=None)
        name = ALL_IMAGES if partition is None else str(int(partition.assign_images(fitted.image[None])[0]))
        if name in writers:
            notices.remark(sample, (NO_CAPTION,) * (data.captions and not sample.caption))
            writers[name].add(fitted)
    counts = {name: writer.close().count for name, writer in writers.items()}
    for text in notices.texts():
        workspace.notify(text)
    if not any(counts.values()):
        reason = "; ".join(notices.texts()) or "none lies in their clusters"
        raise NoSamples(f"{data.path} has no image for experts {', '.join(names)}: {reason}; choose --experts all")
    return {name: scratch / name for name in names}


def run_adapter(config: AdapterStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the adapter of one expert; without images, write a summary that counts none."""
    if not read_json(inputs["images"] / COUNT_FILE):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SUMMARY, {"images": 0})
        return 0.0
    parts = sorted(path for path in inputs["images"].iterdir() if path.is_dir())
    codec = inputs["codec"]
    return train_lora(
        inputs["expert"], parts, load_codec(codec), codec, config.training, config.rank, out, workspace
    ).flops
