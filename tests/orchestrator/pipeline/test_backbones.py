"""Every class of network in a run: from captioned pictures to samples of the ensemble and of a compressed one."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmarks.testbed.backbones import TINY, adapter_of, config_of
from benchmarks.testbed.tiny_run import TINY as TINY_RUN
from ddm.runs import Run
from experts.networks.registry import load_network
from experts.training.flops import count_parameters
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.planning.plan import plan_run
from orchestrator.run.run_folder import RunFolder
from tests.text_encoders import save_tiny_encoder, save_tiny_pipeline

SETTINGS = (
    *(setting for setting in TINY_RUN if not setting.startswith(("data.limit", "codec.", "expert.network"))),
    *("data=image_folder", "data.image_size=16", "data.channels=3", "data.holdout=0.4", "expert=unet"),
    *("codec=patch_pca", "codec.patch_size=2", "codec.latent_channels=4", "partition.num_fine=2"),
    *("expert.training.steps=2", "router.training.steps=2", "scores.spaces=[pixels]", "baselines=[]"),
    *("quantize=int8_weight_only", "ensemble.guidance_scale=2"),
)
ENCODERS = {
    "UNet2DConditionModel/sdxl": ("StableDiffusionXLPipeline", 32),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", 40),
    "FluxTransformer2DModel": ("FluxPipeline", 8),
}
"""The pipelines whose text encoders go with a class, and the length of their texts; others have one encoder."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draws, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for number in range(80):
        name = ("dark", "light")[number % 2]
        (folder / name).mkdir(exist_ok=True)
        pixels = draws.integers(0, 100, (16, 16, 3)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
        (folder / name / f"{number}.txt").write_text(f"a {name} {('boot', 'shirt')[number % 3 // 2]}")
    return folder


def text_settings(case: str, folder: Path) -> tuple[str, ...]:
    """Write the encoder of a case and return its settings."""
    if not adapter_of(case).reads_text:
        return ()
    shared = ("data.captions=true", "text.classes=false", "scores.conditional=false")
    if case in ENCODERS:
        pipeline, length = ENCODERS[case]
        path = save_tiny_pipeline(folder, pipeline)
        return (*shared, "text=diffusers", f"text.path={path}", f"text.length={length}")
    return (*shared, "text=transformers", f"text.path={save_tiny_encoder(folder, 'transformers')}", "text.length=6")


@pytest.mark.integration
@pytest.mark.parametrize("case", TINY)
def test_backbone_goes_through_the_whole_pipeline(case, pictures, tmp_path):
    settings = [*SETTINGS, *text_settings(case, tmp_path / "encoder"), f"data.path={pictures}"]
    if case.endswith("/pixels"):
        settings.append("codec=pixels")
    config = parse_config(compose([*settings, f"folder={tmp_path / 'run'}"]))
    config = replace(config, expert=replace(config.expert, network=config_of(case)))
    planned = {stage.name: stage for stage in plan_run(config, RunFolder(tmp_path / "run")).stages}
    console = Console(file=io.StringIO(), width=200)
    run_pipeline(config, console)
    assert not run_pipeline(config, console).submitted
    run = Run(tmp_path / "run")
    networks = [path.parent for path in run.pipeline_folder().glob("expert_*/config.json")]
    assert len(networks) == config.partition.num_experts
    assert {count_parameters(load_network(network)) for network in networks} == {planned["expert_0"].parameters}
    wanted = {"prompt": "a dark boot"} if adapter_of(case).reads_text else {"class_labels": "dark"}
    other = {"prompt": "a light shirt"} if adapter_of(case).reads_text else {"class_labels": "light"}
    for name in ("ensemble", "quantize"):
        pipe = run.pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(seeds=[3, 4], **wanted, output_type="latent").latents
        assert latents.shape == (2, 3, 16, 16) if case.endswith("/pixels") else (2, 4, 8, 8)
        assert latents.isfinite().all()
        torch.testing.assert_close(
            pipe(seeds=[4], **wanted, output_type="latent").latents, latents[1:], atol=1e-4, rtol=1e-4
        )
        assert not torch.equal(pipe(seeds=[3, 4], **other, output_type="latent").latents, latents)
