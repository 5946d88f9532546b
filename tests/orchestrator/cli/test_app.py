"""The command line as a person uses it: on a finished run of digits, and with mistakes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CHECKSUM_KEY, read_json, with_checksum, write_text
from ensemble.pipeline import DDMPipeline
from orchestrator.cli.app import app, parse_seeds
from orchestrator.errors import ConfigError, RunFolderError
from router.config import RouterConfig
from router.models.registry import build_router

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


def in_process(*words: object) -> str:
    """What a command prints; its error is raised, as `main` sees it."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def artifact(run: Path, name: str) -> Path:
    return next(run.glob(f"artifacts/{name}-*"))


@pytest.mark.slow
class TestLookingIntoAFinishedRun:
    def test_audit_writes_its_findings_its_picture_and_a_section_of_the_report(self, run):
        said = " ".join(in_process("audit", run).split())
        assert "Nearness to the training set, pixels" in said and "the expert that was drawn for it" in said
        found = json.loads((artifact(run, "audit_sticky") / "audit.json").read_text())
        assert found["training"] == 400 and len(found["suspects"]) == 8
        assert Image.open(artifact(run, "audit_sticky") / "suspects.png").size == (71, 17)
        page = (run / "report.html").read_text()
        assert "Copies of training images: sticky" in page and "Copies of training images: monolith" not in page

    def test_asking_again_does_nothing(self, run):
        written = artifact(run, "audit_sticky").stat().st_mtime_ns
        in_process("audit", run)
        assert artifact(run, "audit_sticky").stat().st_mtime_ns == written

    def test_the_monoliths_samples_count_for_the_cluster_that_they_look_like(self, run):
        assert "the cluster that it looks like" in " ".join(in_process("audit", run, "--row", "monolith").split())

    def test_an_unknown_row_lists_the_known(self, run):
        with pytest.raises(ConfigError, match=r"'best' is not a row.*sticky.*monolith"):
            in_process("audit", run, "--row", "best")

    def test_classify_prints_and_writes_the_matrix(self, run):
        said = in_process("classify", run, "--images", "40", "--draws", "2")
        assert "expert_1" in said and "commonest class" in said
        found = json.loads((artifact(run, "classify") / "classify.json").read_text())
        assert found["models"] == ["ensemble", "expert_0", "expert_1"] and found["images"] == [20, 20]
        assert all(0 <= value <= 1 for row in found["accuracy"] for value in row)


@pytest.mark.slow
class TestExpertsComeAndGo:
    def test_list_shows_every_expert_and_its_share(self, run):
        said = in_process("experts", "list", run)
        assert said.count("ResidualMLP") == 2 and "missing" not in said

    def test_who_is_removed_is_missing_wherever_the_ensemble_is_sampled(self, run, tmp_path):
        said = in_process("experts", "remove", run, "1")
        folder = artifact(run, "ensemble_without_1")
        assert "1 of 2 experts is missing (1)" in said and f"--ensemble {folder}" in said
        assert "missing" in in_process("experts", "list", run, "--ensemble", folder)
        sampled = in_process("sample", run, "--ensemble", folder, "--out", tmp_path / "grid.png")
        assert "Warning: 1 of 2 experts is missing (1), which stood for" in sampled
        assert "Warning" not in in_process("sample", run, "--out", tmp_path / "grid.png")

    def test_who_comes_back_makes_it_whole(self, run, tmp_path):
        in_process("experts", "remove", run, "1", "--out", tmp_path / "left")
        back = ("experts", "add", run, artifact(run, "expert_1"), "--place", "1")
        said = in_process(*back, "--ensemble", tmp_path / "left", "--out", tmp_path / "back")
        assert "experts 0, 1" in said and "Warning" not in said
        pictures = [tmp_path / "whole.png", tmp_path / "back.png"]
        in_process("sample", run, "--seeds", "0-3", "--out", pictures[0])
        in_process("sample", run, "--seeds", "0-3", "--ensemble", tmp_path / "back", "--out", pictures[1])
        assert pictures[0].read_bytes() == pictures[1].read_bytes()

    def test_a_router_of_one_network_takes_nobody_new(self, run):
        shards = artifact(run, "partition") / "clusters" / "1"
        with pytest.raises(RunFolderError, match="density_ratio.*RouterMLP.*--place"):
            in_process("experts", "add", run, artifact(run, "expert_1"), "--shards", shards)

    def test_a_router_of_heads_takes_a_new_one(self, run, tmp_path):
        base = DDMPipeline.from_pretrained(artifact(run, "ensemble"))
        recipe = RouterConfig(kind="density_ratio", width=8, depth=1)
        heads = build_router(recipe, base.codec.latent_shape, 2, 10)
        router = replace(base.ensemble.router, model=heads)
        replace(base, ensemble=replace(base.ensemble, router=router)).save_pretrained(tmp_path / "heads")
        shards = artifact(run, "partition") / "clusters" / "1"
        more = ("experts", "add", run, artifact(run, "expert_1"), "--shards", shards, "--ensemble", tmp_path / "heads")
        assert "experts 0, 1, 2" in in_process(*more, "--out", tmp_path / "more")
        grown = DDMPipeline.from_pretrained(tmp_path / "more").ensemble
        assert grown.router.prior_counts[-1].tolist() == [*router.prior_counts[-1].tolist(), read_index(shards).count]
        old = [
            DDMPipeline.from_pretrained(tmp_path / name).ensemble.router.model.heads[0] for name in ("heads", "more")
        ]
        ours, theirs = (dict(head.state_dict()) for head in old)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    @pytest.mark.parametrize("given", [(), ("--place", "1", "--shards", "somewhere")])
    def test_a_new_expert_has_a_place_or_samples(self, run, given):
        with pytest.raises(ConfigError, match="needs its samples"):
            in_process("experts", "add", run, artifact(run, "expert_1"), *given)

    def test_an_expert_of_another_codec_is_refused(self, run, tmp_path):
        folder = shutil.copytree(artifact(run, "expert_1"), tmp_path / "expert")
        manifest = read_json(folder / "manifest.json")
        manifest["inputs"]["codec"] = "0" * 64
        write_text(
            folder / "manifest.json", with_checksum({name: manifest[name] for name in manifest if name != CHECKSUM_KEY})
        )
        in_process("experts", "remove", run, "1", "--out", tmp_path / "left")
        with pytest.raises(ConfigError, match="trained with its codec"):
            in_process("experts", "add", run, folder, "--place", "1", "--ensemble", tmp_path / "left")

    def test_an_out_folder_of_something_else_is_left_alone(self, run, tmp_path):
        (tmp_path / "mine").mkdir()
        with pytest.raises(ConfigError, match="choose another --out"):
            in_process("experts", "remove", run, "1", "--out", tmp_path / "mine")
        in_process("experts", "remove", run, "1", "--out", tmp_path / "left")
        with pytest.raises(ConfigError, match="holds another ensemble"):
            in_process("experts", "remove", run, "0", "--out", tmp_path / "left")
