"""An ensemble of one samples what diffusers' own pipeline of its network samples, from the same noise."""

import pytest

from benchmarks.arms.diffusers_pipelines import CASES, sample_both


@pytest.mark.parametrize("name", CASES)
def test_ensemble_of_one_equals_diffusers_own_pipeline(name):
    ours, theirs = sample_both(name)
    assert (ours - theirs).abs().max() < 1e-5
    assert theirs.abs().mean() > 0.1
