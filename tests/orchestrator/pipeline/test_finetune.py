"""`ddm finetune`: adapters of a run's experts, trained on a folder of images, and loaded into its pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ddm
from ddm_core.artifacts import list_files, read_json
from orchestrator.cli.app import app
from tests.laws.conftest import tiny_run  # noqa: F401 - a fixture

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
def test_adapters_change_the_samples_of_their_experts(tiny_run, images, tmp_path):  # noqa: F811 - the fixture
    before = {file: file.read_bytes() for file in list_files(tiny_run)}
    result = invoke(tiny_run, "--images", images, "--out", tmp_path / "lora", "--experts", "1", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "lora" / "expert_0").exists()
    assert read_json(tmp_path / "lora" / "expert_1" / "training.json")["images"] == 12
    assert before == {file: file.read_bytes() for file in list_files(tiny_run)}
    pipe = ddm.DDMPipeline.from_pretrained(tiny_run)
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
def test_images_are_routed_and_finished_adapters_kept(tiny_run, images, tmp_path):  # noqa: F811 - the fixture
    words = (tiny_run, "--images", images, "--out", tmp_path / "lora", *OPTIONS)
    assert invoke(*words).exit_code == 0
    summaries = {path: read_json(path) for path in (tmp_path / "lora").glob("expert_*/training.json")}
    assert sum(summary["images"] for summary in summaries.values()) == 12
    assert invoke(*words).exit_code == 0
    assert summaries == {path: read_json(path) for path in summaries}
    result = invoke(*words[:-6], "--experts", "0,9")
    assert result.exit_code != 0
    (tmp_path / "empty").mkdir()
    assert invoke(tiny_run, "--images", tmp_path / "empty", "--out", tmp_path / "x").exit_code != 0
