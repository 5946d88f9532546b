"""A trial's name: readable, safe as a folder, and its own."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.sweeps.trial import LONGEST_LABEL, SweepTrial, swept_parameters, trial_config, trial_label

VALUES = st.text(max_size=80) | st.text(alphabet="a_/é ", min_size=1, max_size=3) | st.text(alphabet="ab", min_size=150)
TEXTS = st.dictionaries(st.sampled_from(["seed", "expert.lr", "data"]), VALUES, min_size=1, max_size=3)


def test_plain_values_are_the_name():
    assert trial_label({"b": "2", "a": "1e-3"}) == "a=1e-3,b=2"
    assert trial_label({"+a": "1"}) == "a=1"
    assert trial_label({}) == "only"


@given(TEXTS)
def test_every_name_is_a_folder_and_a_run(parameters):
    label = trial_label(parameters)
    assert re.fullmatch(r"[\w.=,+-]+", label, flags=re.ASCII) and len(label) <= LONGEST_LABEL + 9
    assert trial_config({"name": "run", "folder": "runs/run"}, label).folder == f"runs/run/{label}"


@given(TEXTS, TEXTS)
@example({"seed": "a/b"}, {"seed": "a_b"})
@example({"seed": "a" * 200}, {"seed": "a" * 201})
def test_other_values_have_another_name(one, other):
    def written(parameters):
        return ",".join(sorted(f"{key}={value}" for key, value in parameters.items()))

    assert (trial_label(one) == trial_label(other)) == (written(one) == written(other))


def test_only_what_is_swept_is_in_the_name():
    assert swept_parameters(["a=1", "+b.c=x", "d=2"], {"a", "b.c"}) == {"a": "1", "b.c": "x"}


def test_a_trial_without_a_configuration_has_no_folder():
    with pytest.raises(ConfigError, match="batch"):
        _ = SweepTrial(number=0, label="x", config=None, error="the batch is not whole").run
    assert not SweepTrial(number=0, label="x", config=None).is_finished
    assert not SweepTrial(number=0, label="x", config=RunConfig(folder="none/such")).is_finished
