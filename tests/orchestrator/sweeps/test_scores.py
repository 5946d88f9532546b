"""The number by which trials are compared."""

import math

import pytest

from orchestrator.errors import ConfigError
from orchestrator.sweeps.scores import default_metric, numbers, refuse_unknown_rows, score_of
from tests.orchestrator.sweeps.fake_sweep import trial_in
from tests.orchestrator.sweeps.fake_trial import walk


@pytest.fixture
def trial(tmp_path):
    trial = trial_in(tmp_path, 0, {"expert.training.lr": "0.25"})
    trial.run.save_config(trial.config)
    return trial


def test_a_score_is_found_by_its_name(trial):
    assert score_of(trial.run, trial.config, "") is None
    assert walk(trial.run) == 0
    assert numbers(trial.run, trial.config) == {"sticky.pixels.fd": 0.25, "sticky.nn_ratio": 1.0}
    assert score_of(trial.run, trial.config, "") == score_of(trial.run, trial.config, "sticky.pixels.fd") == 0.25
    assert score_of(trial.run, trial.config, "sticky.pixels.none") is None


def test_what_is_no_number_is_no_score(tmp_path):
    trial = trial_in(tmp_path, 0, {"expert.training.lr": "1e308"})
    trial.run.save_config(trial.config)
    assert walk(trial.run, lambda config: math.nan) == 0
    assert math.isnan(numbers(trial.run, trial.config)["sticky.pixels.fd"])
    assert score_of(trial.run, trial.config, "") is None


def test_a_row_that_no_run_has_is_refused_before_anything_runs(trial):
    refuse_unknown_rows(default_metric(trial.config), trial.config)
    for metric in ("monolith.pixels.fd", "fd", "stick.pixels.fd"):
        with pytest.raises(ConfigError, match=r"sticky.*such as sticky\.pixels\.fd"):
            refuse_unknown_rows(metric, trial.config)
