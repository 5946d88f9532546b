"""`auto` from the configuration to the picture: a run of digits chooses, scores and says what it has chosen."""

import io
import json

import pytest
from rich.console import Console

from orchestrator.cli.app import _write_report
from orchestrator.cli.sample import sample_run
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import RunFolderError
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import TINY

FEW = (
    "monolith=false",
    "scores.num_samples=64",
    "ensemble.steps=4",
    "selection_search.num_samples=32",
    "selection_search.steps=3",
)


def walk(folder, *overrides):
    config = parse_config(compose([*TINY, *FEW, *overrides, f"folder={folder}"]))
    return run_pipeline(config, Console(file=io.StringIO()))


def sampled(run, select, out):
    return sample_run(RunFolder(run), range(4), "", select, out / "grid.png", None, None, monolith=False)


@pytest.mark.slow
class TestARunThatChooses:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """Finished with sticky, where it has chosen nothing, and then told to choose."""
        folder = tmp_path_factory.mktemp("auto")
        walk(folder)
        with pytest.raises(RunFolderError, match=f"ddm evaluate {folder} --select auto.* --select sticky"):
            sampled(folder, "auto", folder)
        assert walk(folder, "ensemble=auto", "ensemble.steps=4").submitted == 2
        _write_report(folder)
        return folder

    @pytest.fixture(scope="class")
    def choice(self, run):
        return json.loads(next(run.glob("artifacts/choice-*/choice.json")).read_text())

    def test_the_choice_says_why(self, choice):
        rows = {candidate["name"]: candidate for candidate in choice["candidates"]}
        assert len(rows) == 9 and not rows["full"]["is_affordable"]
        assert set(rows["sticky"]["fd"]) == {"pixels", "random_conv"}
        affordable = [candidate for candidate in rows.values() if candidate["is_affordable"]]
        assert rows[choice["name"]] == min(affordable, key=lambda candidate: candidate["mean"])
        assert choice["why"].startswith(f"{choice['name']} has Fréchet distances of ")
        assert choice["name"].startswith(choice["selection"]["name"])

    def test_the_score_and_the_report_are_of_what_was_chosen(self, run, choice):
        scores = json.loads(next(run.glob("artifacts/score_auto-*/scores.json")).read_text())
        assert scores["selection"] == choice["name"]
        page = (run / "report.html").read_text()
        assert f"auto: {choice['name']} (default)" in page and choice["why"] in page

    def test_sample_draws_with_what_was_chosen(self, run, choice, tmp_path):
        for select in ("", "auto", choice["name"]):
            assert f"4 images, {choice['name']}, " in sampled(run, select, tmp_path)

    def test_a_second_run_submits_nothing(self, run):
        assert walk(run, "ensemble=auto", "ensemble.steps=4").submitted == 0
