"""The metric by which trials are compared."""

import math

import pytest

from orchestrator.errors import ConfigError
from orchestrator.sweeps.scores import check_metric, default_metric, load_score, load_score_values
from tests.orchestrator.sweeps.fake_sweep import build_fake_trial
from tests.orchestrator.sweeps.fake_trial import run_fake_trial


@pytest.fixture
def trial(tmp_path):
    trial = build_fake_trial(tmp_path, 0, {"expert.training.lr": "0.25"})
    trial.run.save_config(trial.config)
    return trial


def test_score_is_loaded_by_metric_name(trial):
    assert load_score(trial.run, trial.config, "") is None
    assert run_fake_trial(trial.run) == 0
    values = load_score_values(trial.run, trial.config)
    assert values["sticky.pixels.fd"] == 0.25 and values["sticky.calls_per_step"] == 1.0
    assert load_score(trial.run, trial.config, "") == load_score(trial.run, trial.config, "sticky.pixels.fd") == 0.25
    assert load_score(trial.run, trial.config, "sticky.pixels.none") is None


def test_nan_is_not_a_score(tmp_path):
    trial = build_fake_trial(tmp_path, 0, {"expert.training.lr": "1e308"})
    trial.run.save_config(trial.config)
    assert run_fake_trial(trial.run, lambda config: math.nan) == 0
    assert math.isnan(load_score_values(trial.run, trial.config)["sticky.pixels.fd"])
    assert load_score(trial.run, trial.config, "") is None


def test_metric_of_an_unscored_row_is_rejected(trial):
    check_metric(default_metric(trial.config), trial.config)
    for metric in ("monolith.pixels.fd", "fd", "stick.pixels.fd"):
        with pytest.raises(ConfigError, match=r"sticky.*such as sticky\.efficientnet_lite0\.fd"):
            check_metric(metric, trial.config)
