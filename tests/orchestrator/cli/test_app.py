"""The command line: on a finished run of digits, and with invalid arguments."""

import json
import re
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
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.prompts import PromptError
from orchestrator.cli.app import COMMANDS, app
from orchestrator.cli.pipelines import parse_seeds
from orchestrator.controller import BACKENDS
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError
from router.config import RouterConfig
from router.models.registry import build_router
from tests.test_house import ROOT

TINY = (
    "experiment=digits",
    "data.limit=400",
    "expert.training.steps=40",
    "router.training.steps=40",
    "scores.num_samples=64",
    "scores.spaces=[pixels]",
    "ensemble.steps=4",
)


def ddm(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ddm("run", *TINY, f"folder={folder}")
    return folder


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("3,5,8", [3, 5, 8]), ("0-1, 7", [0, 1, 7])]
)
def test_parse_seeds_ranges_and_lists_returns_numbers(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-2-3", "0-99999999999999", str(2**64), "0-5000,1-6000"])
def test_parse_seeds_invalid_text_names_the_option(text):
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_run_misspelled_key_suggests_correct_key():
    output = ddm("run", "experiment=digits", "partition.num_expert=2", code=1)
    assert output.startswith("Reading the configuration …\n") and "did you mean partition.num_experts" in output


def test_start_of_ray_is_announced_before_it_starts(tmp_path, monkeypatch):
    def refuse(config, run):
        raise OrchestratorError("Ray starts")

    monkeypatch.setitem(BACKENDS, "ray", refuse)
    words = ["run", "experiment=digits", "compute=ray_local", f"folder={tmp_path / 'run'}", "wandb.mode=disabled"]
    result = CliRunner().invoke(app, words)
    assert str(result.exception) == "Ray starts"
    assert result.output == "Reading the configuration …\nStarting Ray on this machine …\n"


def test_status_folder_without_run_is_one_error(tmp_path):
    assert "not a run folder" in ddm("status", tmp_path, code=1)


def test_help_lists_commands_in_order_of_use():
    output = in_process("--help")
    assert "Train and sample decentralized diffusion models" in " ".join(output.split())
    lines = [line.strip("│ ").split(" ")[0] for line in output.partition("Commands")[2].splitlines()]
    assert [word for word in lines if word in COMMANDS] == list(COMMANDS)


@pytest.mark.slow
class TestFinishedRun:
    def test_report_contains_all_resources(self, run):
        page = (run / "report.html").read_text()
        assert page.count("data:image/png;base64,") >= 4 and page.count("<svg") >= 4
        assert 'src="http' not in page and 'href="http' not in page
        for word in ("Clusters", "Router on held-out", "Training FLOPs", "Timeline", "(default)"):
            assert word in page

    def test_monolith_and_experts_use_equal_flops(self, run):
        manifests = [json.loads(path.read_text()) for path in run.glob("artifacts/*/manifest.json")]
        flops = {manifest["stage"]: manifest["flops"] for manifest in manifests}
        expert_flops = sum(flops[name] for name in ("expert_0", "expert_1", "router", "features", "partition"))
        assert flops["monolith"] == pytest.approx(expert_flops, rel=0.02)

    def test_sample_of_an_own_network_loads_only_what_it_needs(self, run, tmp_path):
        heavy = ("scipy", "sklearn", "pandas", "ray", "faiss", "wandb", "matplotlib", "hydra", "peft", "torchao")
        heavy += ("transformers.models", "diffusers.hooks", "diffusers.models.unets", "diffusers.models.transformers")
        words = ["sample", str(run), "--seeds", "0", "--out", str(tmp_path / "one.png")]
        code = (
            f"import sys; from orchestrator.cli.app import app\napp({words!r}, standalone_mode=False)\n"
            f"print([name for name in {heavy!r} if name in sys.modules])"
        )
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert process.stdout.splitlines()[-1] == "[]"

    def test_status_finished_run_lists_every_stage(self, run):
        output = ddm("status", run)
        assert output.count("finished") == 14 and "no controller" in output

    def test_sample_sixteen_seeds_writes_one_grid(self, run, tmp_path):
        output = ddm("sample", run, "--seeds", "0-15", "--selection", "top_k", "--out", tmp_path / "grid.png")
        assert "16 images, top_k" in output
        assert 400 < Image.open(tmp_path / "grid.png").width <= 800

    def test_sample_same_seed_gives_same_image_in_any_batch(self, run, tmp_path):
        in_process("sample", run, "--seeds", "7", "--label", "3", "--out", tmp_path / "one.png")
        in_process("sample", run, "--seeds", "7,8,9,10", "--label", "3", "--out", tmp_path / "four.png")
        one, four = (Image.open(tmp_path / name) for name in ("one.png", "four.png"))
        one, four = one.resize((8, 8), 0), four.resize((17, 17), 0).crop((0, 0, 8, 8))
        assert np.abs(np.asarray(one).astype(int) - np.asarray(four)).max() <= 1

    def test_sample_unknown_label_lists_classes(self, run, tmp_path):
        with pytest.raises(PromptError, match="known: 0 "):
            in_process("sample", run, "--label", "cat", "--out", tmp_path / "x.png")

    def test_sample_unknown_selection_lists_known_ones(self, run, tmp_path):
        assert "sticky" in ddm("sample", run, "--selection", "best", "--out", tmp_path / "x.png", code=1)

    def test_logs_unknown_stage_lists_known_stages(self, run):
        assert "expert_1" in ddm("logs", run, "expert_9", code=1)
        assert "run_started" in ddm("logs", run)
        ddm("logs", run, "expert_1")

    def test_stop_without_controller_is_an_error(self, run):
        assert "nothing is running" in ddm("stop", run, code=1)

    def test_evaluate_new_selection_adds_one_row(self, run):
        output = in_process("evaluate", run, "--selection", "full")
        assert "full" in output and "score_full" in output
        assert "expert_0" not in output.replace("✔ expert_0               finished before", "")

    def test_run_offline_wandb_has_one_run_per_training(self, run):
        names = [path.name for path in (run / "wandb").glob("offline-run-*")]
        assert any("expert_0" in name for name in names) and any("monolith" in name for name in names)

    @pytest.mark.integration
    def test_sweep_two_values_writes_two_reports(self, tmp_path):
        folder = tmp_path / "sweep"
        ddm("run", "-m", *TINY, f"folder={folder}", "wandb.mode=disabled", "partition.num_experts=1,2")
        assert len(list(folder.glob("*/report.html"))) == 2


def in_process(*arguments: object) -> str:
    """Return what a command prints; raise its error, as `main` receives it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def artifact(run: Path, name: str) -> Path:
    return next(run.glob(f"artifacts/{name}-*"))


def paths(value, prefix="") -> set[str]:
    """Return the places of all values of a JSON value; a list has the places of its members."""
    if isinstance(value, dict):
        return {prefix}.union(*(paths(member, f"{prefix}.{key}") for key, member in value.items()))
    return {prefix}.union(*(paths(member, f"{prefix}[]") for member in value)) if isinstance(value, list) else {prefix}


PAGE = (ROOT / "docs" / "guides" / "scripts.md").read_text()
EXAMPLES = re.findall(r"```bash\nddm ([^\n]* --json)\n```\n\n```json\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "example"), EXAMPLES)
def test_json_is_alone_and_as_documented(run, tmp_path, monkeypatch, command, example):
    monkeypatch.chdir(tmp_path)
    words = [str(run) if word == "runs/digits" else word for word in command.split()]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    printed, documented = json.loads(result.stdout), json.loads(example)
    assert paths(documented) <= paths(printed)
    assert len(EXAMPLES) >= 10


@pytest.mark.slow
class TestAnalysisOfFinishedRun:
    def test_audit_writes_findings_image_and_report_section(self, run):
        output = " ".join(in_process("audit", run).split())
        assert "Nearness to the training set, pixels" in output and "the expert that generated it" in output
        audit = json.loads((artifact(run, "audit_sticky") / "audit.json").read_text())
        assert audit["training"] == 400 and len(audit["suspects"]) == 8
        assert Image.open(artifact(run, "audit_sticky") / "suspects.png").size == (71, 17)
        page = (run / "report.html").read_text()
        assert "Memorization audit: sticky" in page and "Memorization audit: monolith" not in page

    def test_audit_second_call_reuses_artifact(self, run):
        written = artifact(run, "audit_sticky").stat().st_mtime_ns
        in_process("audit", run)
        assert artifact(run, "audit_sticky").stat().st_mtime_ns == written

    def test_audit_monolith_groups_samples_by_similar_cluster(self, run):
        assert "the cluster that it resembles" in " ".join(in_process("audit", run, "--row", "monolith").split())

    def test_audit_unknown_row_lists_known_rows(self, run):
        with pytest.raises(ConfigError, match=r"'best' is not a row.*sticky.*monolith"):
            in_process("audit", run, "--row", "best")

    def test_classify_prints_and_writes_matrix(self, run):
        output = in_process("classify", run, "--images", "40", "--draws", "2")
        assert "expert_1" in output and "most frequent class" in output
        result = json.loads((artifact(run, "classify") / "classify.json").read_text())
        assert result["models"] == ["ensemble", "expert_0", "expert_1"] and result["images"] == [20, 20]
        assert all(0 <= value <= 1 for row in result["accuracy"] for value in row)


@pytest.mark.slow
class TestExpertChanges:
    def test_experts_list_shows_every_expert_and_share(self, run):
        output = in_process("experts", "list", run)
        assert output.count("ResidualMLP") == 2 and "missing" not in output

    def test_experts_remove_marks_expert_as_missing(self, run, tmp_path):
        output = in_process("experts", "remove", run, "1")
        folder = artifact(run, "ensemble_without_1")
        assert "1 of 2 experts is missing (1)" in output and f"--ensemble {folder}" in output
        assert "missing" in in_process("experts", "list", run, "--ensemble", folder)
        sampled = in_process("sample", run, "--ensemble", folder, "--out", tmp_path / "grid.png")
        assert "Warning: 1 of 2 experts is missing (1), trained on" in sampled
        assert "Warning" not in in_process("sample", run, "--out", tmp_path / "grid.png")

    def test_experts_add_restored_expert_samples_identically(self, run, tmp_path):
        in_process("experts", "remove", run, "1", "--out", tmp_path / "left")
        back = ("experts", "add", run, artifact(run, "expert_1"), "--place", "1")
        output = in_process(*back, "--ensemble", tmp_path / "left", "--out", tmp_path / "back")
        assert "experts 0, 1" in output and "Warning" not in output
        pictures = [tmp_path / "original.png", tmp_path / "back.png"]
        in_process("sample", run, "--seeds", "0-3", "--out", pictures[0])
        in_process("sample", run, "--seeds", "0-3", "--ensemble", tmp_path / "back", "--out", pictures[1])
        assert pictures[0].read_bytes() == pictures[1].read_bytes()

    def test_experts_add_to_single_router_network_is_an_error(self, run):
        shards = artifact(run, "partition") / "clusters" / "1"
        with pytest.raises(RunFolderError, match="density_ratio.*MLPRouter.*--place"):
            in_process("experts", "add", run, artifact(run, "expert_1"), "--shards", shards)

    def test_experts_add_to_router_with_heads_adds_a_head(self, run, tmp_path):
        base = EnsemblePipeline.from_pretrained(artifact(run, "ensemble"))
        config = RouterConfig(kind="density_ratio", width=8, depth=1)
        heads = build_router(config, base.codec.latent_shape, 2, 10)
        router = replace(base.ensemble.router, model=heads)
        replace(base, ensemble=replace(base.ensemble, router=router)).save_pretrained(tmp_path / "heads")
        shards = artifact(run, "partition") / "clusters" / "1"
        command = (
            "experts",
            "add",
            run,
            artifact(run, "expert_1"),
            "--shards",
            shards,
            "--ensemble",
            tmp_path / "heads",
        )
        assert "experts 0, 1, 2" in in_process(*command, "--out", tmp_path / "more")
        extended = EnsemblePipeline.from_pretrained(tmp_path / "more").ensemble
        assert extended.router.prior_counts[-1].tolist() == [
            *router.prior_counts[-1].tolist(),
            read_index(shards).count,
        ]
        first_heads = [
            EnsemblePipeline.from_pretrained(tmp_path / name).ensemble.router.model.heads[0]
            for name in ("heads", "more")
        ]
        before, after = (dict(head.state_dict()) for head in first_heads)
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("options", [(), ("--place", "1", "--shards", "somewhere")])
    def test_experts_add_without_place_or_shards_is_an_error(self, run, options):
        with pytest.raises(ConfigError, match="needs its samples"):
            in_process("experts", "add", run, artifact(run, "expert_1"), *options)

    def test_experts_add_other_codec_is_an_error(self, run, tmp_path):
        folder = shutil.copytree(artifact(run, "expert_1"), tmp_path / "expert")
        manifest = read_json(folder / "manifest.json")
        manifest["inputs"]["codec"] = "0" * 64
        write_text(
            folder / "manifest.json", with_checksum({name: manifest[name] for name in manifest if name != CHECKSUM_KEY})
        )
        in_process("experts", "remove", run, "1", "--out", tmp_path / "left")
        with pytest.raises(ConfigError, match="trained with its codec"):
            in_process("experts", "add", run, folder, "--place", "1", "--ensemble", tmp_path / "left")

    def test_experts_remove_into_used_folder_is_an_error(self, run, tmp_path):
        (tmp_path / "used").mkdir()
        with pytest.raises(ConfigError, match="choose another --out"):
            in_process("experts", "remove", run, "1", "--out", tmp_path / "used")
        in_process("experts", "remove", run, "1", "--out", tmp_path / "left")
        with pytest.raises(ConfigError, match="holds another ensemble"):
            in_process("experts", "remove", run, "0", "--out", tmp_path / "left")
