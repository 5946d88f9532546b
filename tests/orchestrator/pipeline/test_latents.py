"""Latents and texts are encoded once a run, and every model reads those of its own cluster."""

import io
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmarks.testbed.tiny_run import TINY
from data_partition.shards.shards import read_index
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from experts.conditions.text_encoder import TextEncoder
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.training.latents import shard_encoder
from experts.training.latents.folder import read_latents
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.checks.check import DataCheck
from orchestrator.run.run_folder import RunFolder
from tests.text_encoders import save_tiny_encoder

SETTINGS = (
    *(setting for setting in TINY if setting != "data.limit=160"),
    *(
        "data=image_folder",
        "data.labels=false",
        "data.image_size=8",
        "data.channels=1",
        "data.shard_samples=16",
        "data.holdout=0.3",
    ),
    *("scores.spaces=[pixels]", "partition.num_experts=2", "partition.num_fine=2", "quantize=int8_dynamic"),
    "baselines=[monolith,cluster_conditioned,distilled_monolith]",
    *("text=transformers", "text.length=6", "scores.conditional=false"),
)


@pytest.mark.slow
def test_every_sample_is_encoded_once_a_run(tmp_path, monkeypatch):
    draws, pictures = np.random.default_rng(0), tmp_path / "pictures"
    pictures.mkdir()
    for number in range(80):
        pixels = draws.integers(0, 100, (8, 8)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(pictures / f"{number}.png")
        if number % 4:
            (pictures / f"{number}.txt").write_text(f"a {('dark', 'light')[number % 2]} boot number {number}")
    encoder = save_tiny_encoder(tmp_path / "encoder", "transformers")
    images, captions = Counter(), Counter()
    encode_images, encode_texts = shard_encoder.ShardEncoder._encode, TextEncoder.encode_and_count
    monkeypatch.setattr(
        shard_encoder.ShardEncoder,
        "_encode",
        lambda self, batch, ids: images.update(batch.keys) or encode_images(self, batch, ids),
    )
    monkeypatch.setattr(
        TextEncoder, "encode_and_count", lambda self, texts: captions.update(texts) or encode_texts(self, texts)
    )
    overrides = (f"data.path={pictures}", f"text.path={encoder}", f"folder={tmp_path / 'run'}")
    config, screen = parse_config(compose([*SETTINGS, *overrides])), io.StringIO()
    run_pipeline(config, Console(file=screen, width=200))
    assert set(images.values()) == {1} and len(images) == 80
    assert {caption: count for caption, count in captions.items() if count > 1 and caption} == {}
    assert "20 read: no caption" in screen.getvalue() and "KiB of latents each" in screen.getvalue()
    run, graph = RunFolder(tmp_path / "run"), build_graph(config)
    stages = {stage.name: stage for stage in graph}
    for k in range(2):
        latents = read_latents(run.input_folder(stages[f"expert_{k}"].inputs["latents"]))
        assert latents.captions is not None and len(latents) > 0
    for name in ("ensemble", "monolith_ensemble", "cluster_conditioned_ensemble", "distilled_monolith_ensemble"):
        pipeline = EnsemblePipeline.from_pretrained(run.artifact(stages[name]))
        assert pipeline.text is not None and pipeline.text.length == 6 and pipeline.text.checksum


BUCKETS = (
    *(setting for setting in TINY if setting.split(".")[0] in ("experiment=digits", "compute", "wandb", "scores")),
    *("expert.training.steps=6", "ensemble.steps=2", "partition.components=4"),
    *("data=image_folder", "data.labels=false", "data.image_size=8", "data.channels=1", "data.holdout=0.3"),
    *(
        "data.aspect_buckets=[12x8,8x16]",
        "data.fit=crop",
        "data.shard_samples=16",
        "scores.spaces=[pixels]",
        "baselines=[]",
    ),
    *("partition.num_experts=2", "partition.num_fine=2", "codec=patch_pca", "codec.patch_size=2"),
    *("codec.latent_channels=4", "expert=unet", "router=prior_table"),
)


@pytest.mark.slow
def test_a_run_with_buckets_trains_on_every_size_and_samples_any(tmp_path, monkeypatch):
    draws, pictures = np.random.default_rng(0), tmp_path / "pictures"
    pictures.mkdir()
    for number in range(90):
        width, height = ((8, 8), (24, 16), (8, 16))[number % 3]
        Image.fromarray(draws.integers(0, 255, (height, width)).astype(np.uint8)).save(pictures / f"{number}.png")
    shapes = Counter()
    add_noise = NoiseSchedule.add_noise
    monkeypatch.setattr(
        NoiseSchedule,
        "add_noise",
        lambda self, clean, noise, t: shapes.update([tuple(clean.shape[1:])]) or add_noise(self, clean, noise, t),
    )
    overrides = (f"data.path={pictures}", f"folder={tmp_path / 'run'}", "expert.training.batch_size=8")
    overrides += ("expert.network.channels=[8,16]",)
    config = parse_config(compose([*BUCKETS, *overrides]))
    run_pipeline(config, Console(file=io.StringIO(), width=200))
    run, stages = RunFolder(tmp_path / "run"), {stage.name: stage for stage in build_graph(config)}
    assert {(4, 4, 4), (4, 4, 6), (4, 8, 4)} <= set(shapes)
    latents = [read_latents(run.input_folder(stages[f"expert_{k}"].inputs["latents"])) for k in range(2)]
    assert sum(map(len, latents)) == read_index(run.artifact(stages["dataset"]) / "train").count
    pipeline = EnsemblePipeline.from_pretrained(run.artifact(stages["ensemble"]))
    alone = pipeline([3], config.ensemble, size=(16, 8))
    assert alone.images.shape == (1, 16, 8, 1)
    torch.testing.assert_close(pipeline([1, 3], config.ensemble, size=(16, 8)).images[1], alone.images[0])
    with pytest.raises(PipelineError, match="patches of side 2 do not divide images of 9x8"):
        pipeline([3], config.ensemble, size=(8, 9))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router=mlp"], "router.kind=mlp reads one; set router=prior_table"),
        (["quantize=int8_dynamic"], "quantize cannot compress experts of data.aspect_buckets"),
    ],
)
def test_parts_of_one_size_are_refused_beside_buckets(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(compose([*BUCKETS, "data.path=/pictures", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["codec=pca"], "codec.kind=pca takes images of one size.*codec=patch_pca"),
        (["expert=residual_mlp"], "residual_mlp takes latents of one shape; choose expert=unet"),
        (["expert=dit"], "dit takes latents of one shape"),
        (
            ["expert.network.channels=[8,8]", "data.aspect_buckets=[9x8]"],
            "codec.patch_size=2 must divide the side of the images, 9",
        ),
    ],
)
def test_codecs_and_networks_of_one_size_are_refused(overrides, message):
    check = DataCheck(parse_config(compose([*BUCKETS, "data.path=/pictures", *overrides])), None)
    check.check_buckets()
    assert re.search(message, "\n".join(check.mistakes)) and not check.is_mendable
