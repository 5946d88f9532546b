"""Optuna's journal: wherever it is cut, the trials that follow are those that would have followed."""

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
    Axis(key="width", low=8, high=64, step=8, is_whole=True),
    Axis(key="share", low=0.1, high=0.7, step=0.1),
    Axis(key="expert", choices=("dit", "unet", "[1,2]")),
)
N = 6


def study(folder, axes=AXES, **chosen) -> Study:
    return Study(folder / "optuna.jsonl", axes, OptunaConfig(startup=3, **chosen), is_parallel=False)


def score(parameters) -> float:
    return float(parameters["lr"]) * int(parameters["width"]) + float(parameters["share"])


def finish(folder) -> list[dict[str, str]]:
    """Go on until there are N scores; the values in the order in which they were proposed."""
    found = study(folder)
    found.refuse_other_meaning(["a=1"], "sticky.pixels.fd")
    for proposal in found.open():
        found.record(proposal.number, score(proposal.parameters))
    while found.total < N:
        proposal = found.propose()
        found.record(proposal.number, score(proposal.parameters))
    return [proposal.parameters for proposal in found.scored()]


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    values = finish(folder)
    return (folder / "optuna.jsonl").read_bytes(), values


def test_the_journal_is_json_lines_and_nothing_else(journal, tmp_path):
    assert all(isinstance(json.loads(line), dict) for line in journal[0].splitlines())
    finish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["optuna.jsonl"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cut_at_any_byte_the_same_trials_follow(journal, tmp_path_factory, data):
    whole, values = journal
    folder = tmp_path_factory.mktemp("cut")
    (folder / "optuna.jsonl").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    (folder / "optuna.jsonl.lock").symlink_to("optuna.jsonl")
    assert finish(folder) == values


def test_an_open_trial_keeps_its_number_and_its_values(tmp_path):
    asked = study(tmp_path).propose()
    assert study(tmp_path).open() == [asked]
    study(tmp_path).record(asked.number, 1.0)
    again = study(tmp_path)
    assert not again.open() and [proposal.number for proposal in again.scored()] == [asked.number]


def test_values_come_back_as_they_are_written(tmp_path):
    found = study(tmp_path)
    for _ in range(20):
        values = found.propose().parameters
        assert values["expert"] in ("dit", "unet", "[1,2]")
        assert values["share"] in ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7")
        assert int(values["width"]) % 8 == 0 and 1e-4 <= float(values["lr"]) <= 1e-2


def test_no_two_trials_are_drawn_alike(journal):
    assert len({parameters["lr"] for parameters in journal[1]}) == N


def test_another_seed_proposes_something_else(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert study(tmp_path / "one").propose() != study(tmp_path / "two", seed=1).propose()


@pytest.mark.parametrize(
    ("fixed", "metric", "axes"),
    [(["a=2"], "x", AXES), (["a=1"], "y", AXES), (["a=1"], "x", AXES[:3]), (["a=1"], "x", AXES[1:])],
)
def test_trials_that_cannot_be_compared_are_refused(tmp_path, fixed, metric, axes):
    study(tmp_path).refuse_other_meaning(["a=1"], "x")
    study(tmp_path).refuse_other_meaning(["a=1"], "x")
    with pytest.raises(ConfigError, match="choose another folder"):
        study(tmp_path, axes).refuse_other_meaning(fixed, metric)


def test_an_interval_that_is_none_says_which(tmp_path):
    with pytest.raises(ConfigError, match="lr: "):
        study(tmp_path, (Axis(key="lr", low=2.0, high=1.0),))
