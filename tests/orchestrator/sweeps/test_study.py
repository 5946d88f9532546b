"""Optuna's journal: after a cut at any byte, the study proposes the same trials."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.sweeps.config import OptunaConfig
from orchestrator.sweeps.search_space import Axis
from orchestrator.sweeps.study import Study

AXES = (
    Axis(key="lr", low=1e-4, high=1e-2, is_log=True),
    Axis(key="width", low=8, high=64, step=8, is_integer=True),
    Axis(key="share", low=0.1, high=0.7, step=0.1),
    Axis(key="expert", choices=("dit", "unet", "[1,2]")),
)
N = 6


def open_study(folder, axes=AXES, **settings) -> Study:
    return Study(folder / "optuna.jsonl", axes, OptunaConfig(startup=3, **settings), is_parallel=False)


def score(parameters) -> float:
    return float(parameters["lr"]) * int(parameters["width"]) + float(parameters["share"])


def finish(folder) -> list[dict[str, str]]:
    """Continue until there are N scores; return the values in the order of their proposals."""
    study = open_study(folder)
    study.check_comparable(["a=1"], "sticky.pixels.fd")
    for proposal in study.open_proposals():
        study.record(proposal.number, score(proposal.parameters))
    while study.total < N:
        proposal = study.propose()
        study.record(proposal.number, score(proposal.parameters))
    return [proposal.parameters for proposal in study.scored_proposals()]


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    values = finish(folder)
    return (folder / "optuna.jsonl").read_bytes(), values


def test_journal_is_the_only_file_and_json_lines(journal, tmp_path):
    assert all(isinstance(json.loads(line), dict) for line in journal[0].splitlines())
    finish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["optuna.jsonl"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_journal_cut_at_any_byte_continues_equally(journal, tmp_path_factory, data):
    complete, values = journal
    folder = tmp_path_factory.mktemp("cut")
    (folder / "optuna.jsonl").write_bytes(complete[: data.draw(st.integers(0, len(complete)))])
    (folder / "optuna.jsonl.lock").symlink_to("optuna.jsonl")
    assert finish(folder) == values


def test_open_trial_keeps_number_and_values(tmp_path):
    proposal = open_study(tmp_path).propose()
    assert open_study(tmp_path).open_proposals() == [proposal]
    open_study(tmp_path).record(proposal.number, 1.0)
    reopened = open_study(tmp_path)
    assert not reopened.open_proposals()
    assert [scored.number for scored in reopened.scored_proposals()] == [proposal.number]


def test_values_are_formatted_as_on_the_command_line(tmp_path):
    study = open_study(tmp_path)
    for _ in range(20):
        values = study.propose().parameters
        assert values["expert"] in ("dit", "unet", "[1,2]")
        assert values["share"] in ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7")
        assert int(values["width"]) % 8 == 0 and 1e-4 <= float(values["lr"]) <= 1e-2


def test_trials_have_different_values(journal):
    assert len({parameters["lr"] for parameters in journal[1]}) == N


def test_other_seed_proposes_other_values(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert open_study(tmp_path / "one").propose() != open_study(tmp_path / "two", seed=1).propose()


@pytest.mark.parametrize(
    ("fixed", "metric", "axes"),
    [(["a=2"], "x", AXES), (["a=1"], "y", AXES), (["a=1"], "x", AXES[:3]), (["a=1"], "x", AXES[1:])],
)
def test_incomparable_trials_are_rejected(tmp_path, fixed, metric, axes):
    open_study(tmp_path).check_comparable(["a=1"], "x")
    open_study(tmp_path).check_comparable(["a=1"], "x")
    with pytest.raises(ConfigError, match="choose another folder"):
        open_study(tmp_path, axes).check_comparable(fixed, metric)


def test_invalid_interval_error_names_the_key(tmp_path):
    with pytest.raises(ConfigError, match="lr: "):
        open_study(tmp_path, (Axis(key="lr", low=2.0, high=1.0),))
