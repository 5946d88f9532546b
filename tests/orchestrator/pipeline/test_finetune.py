"""`ddm finetune`: adapters of a run's experts, trained on a folder of images, and loaded into its pipeline."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import ddm
from ddm_core.artifacts import Workspace, list_files, read_json
from orchestrator.cli.app import app
from orchestrator.config.finetune import FinetuneConfig
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import TRAINING_KINDS
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.run_finetune import run_adapter_images
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import own_run, tiny_run  # noqa: F401 - fixtures

OPTIONS = ("--steps", "3", "--rank", "2", "--batch-size", "4")
SAMPLE = {"seeds": range(6), "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def images(tmp_path):
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(12):
        size = (28, 28)
        Image.fromarray(generator.integers(0, 255, size, np.uint8)).save(folder / f"{number}.png")
    return folder


def invoke(*words):
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


@pytest.mark.slow
def test_adapters_change_the_samples_of_their_experts(own_run, images, tmp_path):  # noqa: F811 - the fixture
    before = {file: file.read_bytes() for file in list_files(own_run / "artifacts")}
    result = invoke(own_run, "--images", images, "--out", tmp_path / "lora", "--experts", "1", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "lora" / "expert_0").exists()
    assert read_json(tmp_path / "lora" / "expert_1" / "training.json")["images"] == 12
    assert before == {file: file.read_bytes() for file in before}
    assert {path.name.rpartition("-")[0] for path in own_run.glob("artifacts/adapter*")} == {
        "adapter_images",
        "adapter_1",
    }
    pipe = ddm.DDMPipeline.from_pretrained(own_run)
    pipe.set_progress_bar_config(disable=True)
    gates = []
    plain = pipe(
        **SAMPLE,
        callback_on_step_end=lambda *inputs: gates.append(inputs[3]["gates"]),
        callback_on_step_end_tensor_inputs=["gates"],
        selection="sticky",
    ).images
    pipe.load_lora_weights(tmp_path / "lora", weight=50.0)
    adapted = pipe(**SAMPLE, selection="sticky").images
    changed = (adapted - plain).abs().flatten(1).amax(1) > 0
    assert torch.equal(changed, gates[0].argmax(1) == 1)
    assert changed.any()


@pytest.mark.slow
def test_images_are_routed_and_finished_adapters_kept(own_run, images, tmp_path):  # noqa: F811 - the fixture
    words = (own_run, "--images", images, "--out", tmp_path / "lora", *OPTIONS)
    assert invoke(*words).exit_code == 0
    summaries = {path: read_json(path) for path in (tmp_path / "lora").glob("expert_*/training.json")}
    assert sum(summary["images"] for summary in summaries.values()) == 12
    artifacts = {path: path.stat().st_mtime_ns for path in own_run.glob("artifacts/adapter*/manifest.json")}
    shutil.rmtree(images)
    images.mkdir()
    config = RunFolder(own_run).load_config()
    assert run_pipeline(config, Console(quiet=True)).submitted == 0, "finished images are taken from the run"
    assert artifacts == {path: path.stat().st_mtime_ns for path in artifacts}
    result = invoke(*words[:-6], "--experts", "0,9")
    assert result.exit_code != 0 and "'9'" in str(result.exception)
    result = invoke(*words)
    assert result.exit_code != 0 and "image" in str(result.exception)


@pytest.mark.slow
def test_lost_adapters_are_trained_to_the_same_bytes(own_run, images, tmp_path):  # noqa: F811 - the fixture
    words = (own_run, "--images", images, "--out", tmp_path / "lora", "--experts", "all", *OPTIONS)
    assert invoke(*words).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "lora").rglob("*.safetensors")}
    for folder in own_run.glob("artifacts/adapter_[01]-*"):
        shutil.rmtree(folder)
    assert run_pipeline(RunFolder(own_run).load_config(), Console(quiet=True)).submitted == 2
    assert invoke(*words).exit_code == 0
    assert len(before) == 2 and before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
def test_a_batch_is_no_larger_than_the_images(tiny_run, images, tmp_path):  # noqa: F811 - the fixture
    before = (tiny_run / "config.yaml").read_bytes()
    result = invoke(tiny_run, "--images", images, "--out", tmp_path / "lora", "--batch-size", 100_000)
    message = str(result.exception)
    assert "has 12, and --batch-size is 100000; lower it" in message
    assert (tiny_run / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_images_that_cannot_be_read_leave_the_run_as_it_was(own_run, images, tmp_path):  # noqa: F811 - the fixture
    before = (own_run / "config.yaml").read_bytes()
    for path in images.glob("*.png"):
        path.write_bytes(b"no image")
    result = invoke(own_run, "--images", images, "--out", tmp_path / "lora", *OPTIONS)
    assert result.exit_code and "adapter_images" in str(result.exception)
    assert (own_run / "config.yaml").read_bytes() == before
    assert run_pipeline(RunFolder(own_run).load_config(), Console(quiet=True)).submitted == 0


def test_images_without_captions_are_counted(tiny_run, images, tmp_path):  # noqa: F811 - the fixture
    (images / "0.txt").write_text("a picture")
    finetune = FinetuneConfig(images=str(images), content="x", experts=(0,), is_routed=False)
    stages = build_graph(replace(RunFolder(tiny_run).load_config(), finetune=finetune))
    config = next(stage.config for stage in stages if stage.name == "adapter_images")
    config = replace(config, data=replace(config.data, captions=True))
    (codec,) = tiny_run.glob("artifacts/codec-*")
    run_adapter_images(config, {"codec": codec}, tmp_path / "out", workspace := Workspace.at(tmp_path / "work"))
    assert any("11 read: no caption, so the null text" in notice for notice in workspace.notices)


def test_adapter_reads_its_own_images_and_expert_alone():
    finetune = FinetuneConfig(images="/images", content="x", experts=(0, 2))
    stages = {stage.name: stage for stage in build_graph(RunConfig(finetune=finetune))}
    adapter = stages["adapter_2"]
    assert {role: (source.stage.name, source.part) for role, source in adapter.inputs.items()} == {
        "expert": ("expert_2", ""),
        "codec": ("codec", ""),
        "images": ("adapter_images", "2"),
    }
    together = {stage.name: stage for stage in build_graph(RunConfig(finetune=replace(finetune, is_routed=False)))}
    assert together["adapter_0"].inputs["images"].part == "all"
    assert "partition" not in together["adapter_images"].inputs
    assert adapter.kind in TRAINING_KINDS, "trainings run on islands"
    without = {stage.name: stage.fingerprint for stage in build_graph(RunConfig())}
    assert without.items() <= {stage.name: stage.fingerprint for stage in stages.values()}.items()
