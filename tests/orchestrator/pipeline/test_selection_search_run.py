"""`auto` from the configuration to the samples: a run of digits searches a selection, scores and reports it."""

import io
import json
from collections import deque

import pytest
from rich.console import Console

from orchestrator.cli.pipelines import write_report_of
from orchestrator.cli.sample import SamplingOptions, prepare_sampling, save_grid
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import RunFolderError
from orchestrator.pipeline import graph as graph_module
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import TINY

FAST = (
    "monolith=false",
    "scores.num_samples=64",
    "scores.spaces=[efficientnet_lite0,pixels]",
    "ensemble.steps=4",
    "selection_search.num_samples=32",
    "selection_search.steps=3",
)


def run_tiny(folder, *overrides):
    config = parse_config(compose([*TINY, *FAST, *overrides, f"folder={folder}"]))
    return run_pipeline(config, Console(file=io.StringIO()))


def sample(run, select, out):
    request = prepare_sampling(RunFolder(run), out / "grid.png", SamplingOptions(selection=select))
    return save_grid(request, request.pipeline(range(4), request.config), out / "grid.png")


@pytest.mark.slow
class TestSelectionSearchRun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """A run that first finishes with sticky, without a search, and then with auto."""
        folder = tmp_path_factory.mktemp("auto")
        run_tiny(folder)
        with pytest.raises(RunFolderError, match=f"ddm evaluate {folder} --selection auto.* --selection sticky"):
            sample(folder, "auto", folder)
        assert run_tiny(folder, "ensemble=auto", "ensemble.steps=4").submitted == 2
        write_report_of(folder)
        return folder

    @pytest.fixture(scope="class")
    def choice(self, run):
        return json.loads(next(run.glob("artifacts/selection_search-*/selection_choice.json")).read_text())

    def test_choice_contains_its_reason(self, choice):
        rows = {candidate["name"]: candidate for candidate in choice["candidates"]}
        assert len(rows) == 9 and not rows["full"]["is_affordable"]
        assert set(rows["sticky"]["fd"]) == {"efficientnet_lite0", "pixels"}
        first = next(name for name, candidate in rows.items() if candidate["is_affordable"])
        assert choice["name"] == first  # too few held-out images for another one
        assert choice["why"].startswith(f"{first} has Fréchet distances of ") and "held-out images" in choice["why"]
        assert choice["name"].startswith(choice["selection"]["name"])

    def test_score_and_report_use_the_chosen_selection(self, run, choice):
        scores = json.loads(next(run.glob("artifacts/score_auto-*/scores.json")).read_text())
        assert scores["selection"] == choice["name"]
        page = (run / "report.html").read_text()
        assert f"auto: {choice['name']} (default)" in page and choice["why"] in page

    def test_sample_uses_the_chosen_selection(self, run, choice, tmp_path):
        for select in ("", "auto", choice["name"]):
            assert f"4 images, {choice['name']}, " in sample(run, select, tmp_path)

    @pytest.mark.parametrize(
        "use_run", [lambda run, out: sample(run, "auto", out), lambda run, out: write_report_of(run)]
    )
    def test_sample_and_report_build_one_graph(self, run, tmp_path, monkeypatch, use_run):
        builds = []
        builder = graph_module._GraphBuilder
        monkeypatch.setattr(graph_module, "_recent_graphs", deque(maxlen=8))
        monkeypatch.setattr(graph_module, "_GraphBuilder", lambda config: builds.append(config) or builder(config))
        use_run(run, tmp_path)
        assert len(builds) == 1

    def test_finished_run_submits_nothing(self, run):
        assert run_tiny(run, "ensemble=auto", "ensemble.steps=4").submitted == 0
