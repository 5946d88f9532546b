"""Latents and texts are encoded once a run, and every model reads those of its own cluster."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks.testbed.tiny_run import TINY
from ensemble.pipeline import EnsemblePipeline
from experts.conditions.text_encoder import TextEncoder
from experts.training import encode
from experts.training.latent_folder import read_latents
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
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
    *("text=transformers", "text.length=6"),
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
    encode_images, encode_texts = encode._Encoding._encode, TextEncoder.encode_and_count
    monkeypatch.setattr(
        encode._Encoding,
        "_encode",
        lambda self, block, shard: images.update(each.key for each in block) or encode_images(self, block, shard),
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
