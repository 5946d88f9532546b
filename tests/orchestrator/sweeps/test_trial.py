"""A trial's name: readable, safe as a folder, and unique."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.sweeps.trial import MAX_LABEL_LENGTH, SweepTrial, label_trial, parse_trial_config, swept_parameters

VALUES = st.text(max_size=80) | st.text(alphabet="a_/é ", min_size=1, max_size=3) | st.text(alphabet="ab", min_size=150)
TEXTS = st.dictionaries(st.sampled_from(["seed", "expert.lr", "data"]), VALUES, min_size=1, max_size=3)


def test_plain_values_form_the_label():
    assert label_trial({"b": "2", "a": "1e-3"}) == "a=1e-3,b=2"
    assert label_trial({"+a": "1"}) == "a=1"
    assert label_trial({}) == "only"


@given(TEXTS)
def test_every_label_is_a_valid_folder_and_run_name(parameters):
    label = label_trial(parameters)
    assert re.fullmatch(r"[\w.=,+-]+", label, flags=re.ASCII) and len(label) <= MAX_LABEL_LENGTH + 9
    assert parse_trial_config({"name": "run", "folder": "runs/run"}, label).folder == f"runs/run/{label}"


@given(TEXTS, TEXTS)
@example({"seed": "a/b"}, {"seed": "a_b"})
@example({"seed": "a" * 200}, {"seed": "a" * 201})
def test_different_values_have_different_labels(first, second):
    def as_text(parameters):
        return ",".join(sorted(f"{key}={value}" for key, value in parameters.items()))

    assert (label_trial(first) == label_trial(second)) == (as_text(first) == as_text(second))


def test_only_swept_keys_are_parameters():
    assert swept_parameters(["a=1", "+b.c=x", "d=2"], {"a", "b.c"}) == {"a": "1", "b.c": "x"}


def test_trial_without_configuration_has_no_folder():
    with pytest.raises(ConfigError, match="batch"):
        _ = SweepTrial(number=0, label="x", config=None, error="the batch is not whole").run
    assert not SweepTrial(number=0, label="x", config=None).is_finished
    assert not SweepTrial(number=0, label="x", config=RunConfig(folder="none/such")).is_finished
