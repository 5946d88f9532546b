"""The command line as a person uses it: on a finished run of digits, and with mistakes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from orchestrator.cli import parse_seeds
from orchestrator.errors import ConfigError

TINY = (
    "experiment=digits",
    "compute=inline",
    "data.limit=400",
    "expert.training.steps=40",
    "router.training.steps=40",
    "scores.num_samples=64",
    "ensemble.steps=4",
)


def ddm(*words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "orchestrator", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ddm("run", *TINY, f"folder={folder}")
    return folder


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("3,5,8", [3, 5, 8]), ("0-1, 7", [0, 1, 7])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-2-3"])
def test_seeds_that_are_none_say_how_they_are_written(text):
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_a_misspelt_key_is_one_clear_error():
    said = ddm("run", "experiment=digits", "partition.num_expert=2", code=1)
    assert "did you mean partition.num_experts" in said


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path):
    assert "not a run folder" in ddm("status", tmp_path, code=1)


@pytest.mark.slow
class TestOnAFinishedRun:
    def test_the_report_stands_alone(self, run):
        page = (run / "report.html").read_text()
        assert page.count("data:image/png;base64,") >= 4 and page.count("<svg") >= 4
        assert 'src="http' not in page and 'href="http' not in page
        for word in ("What is in each cluster", "Router on held-out", "FLOPs of training", "Who ran when", "(default)"):
            assert word in page

    def test_both_sides_took_the_same_flops(self, run):
        manifests = [json.loads(path.read_text()) for path in run.glob("artifacts/*/manifest.json")]
        flops = {found["stage"]: found["flops"] for found in manifests}
        ours = sum(flops[name] for name in ("expert_0", "expert_1", "router", "features", "partition"))
        assert flops["monolith"] == pytest.approx(ours, rel=0.02)

    def test_status_shows_every_stage(self, run):
        said = ddm("status", run)
        assert said.count("finished") == 13 and "no controller" in said

    def test_sample_draws_a_grid(self, run, tmp_path):
        said = ddm("sample", run, "--seeds", "0-15", "--select", "top_k", "--out", tmp_path / "grid.png")
        assert "16 images, top_k" in said
        assert 400 < Image.open(tmp_path / "grid.png").width <= 800

    def test_an_image_depends_on_its_seed_alone(self, run, tmp_path):
        ddm("sample", run, "--seeds", "7", "--label", "3", "--out", tmp_path / "one.png")
        ddm("sample", run, "--seeds", "7,8,9,10", "--label", "3", "--out", tmp_path / "four.png")
        one, four = (Image.open(tmp_path / name) for name in ("one.png", "four.png"))
        one, four = one.resize((8, 8), 0), four.resize((17, 17), 0).crop((0, 0, 8, 8))
        assert np.abs(np.asarray(one).astype(int) - np.asarray(four)).max() <= 1

    def test_a_label_that_is_none_lists_the_classes(self, run, tmp_path):
        assert "known: 0 " in ddm("sample", run, "--label", "cat", "--out", tmp_path / "x.png", code=1)

    def test_an_unknown_selection_lists_the_known(self, run, tmp_path):
        assert "sticky" in ddm("sample", run, "--select", "best", "--out", tmp_path / "x.png", code=1)

    def test_logs_of_an_unknown_stage_list_the_known(self, run):
        assert "expert_1" in ddm("logs", run, "expert_9", code=1)
        assert "run_started" in ddm("logs", run)
        ddm("logs", run, "expert_1")

    def test_stop_without_a_controller_says_so(self, run):
        assert "nothing is running" in ddm("stop", run, code=1)

    def test_evaluate_adds_a_row_and_runs_nothing_else(self, run):
        said = ddm("evaluate", run, "--select", "full")
        assert "full" in said and "score_full" in said
        assert "expert_0" not in said.replace("✔ expert_0               finished before", "")

    def test_wandb_wrote_offline_runs_in_one_group(self, run):
        names = [path.name for path in (run / "wandb").glob("offline-run-*")]
        assert any("expert_0" in name for name in names) and any("monolith" in name for name in names)

    def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(self, tmp_path):
        folder = tmp_path / "sweep"
        ddm("run", "-m", *TINY, f"folder={folder}", "wandb.mode=disabled", "partition.num_experts=1,2")
        assert len(list(folder.glob("*/report.html"))) == 2
