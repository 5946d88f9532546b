"""Few-step schedules."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddm_core.artifacts import to_json
from ddm_core.json_values import from_json
from experts.diffusion.few_step import FewStepSchedule


@given(steps=st.integers(1, 60), start=st.floats(0.01, 1), step_type=st.sampled_from(["euler", "renoise"]))
def test_uniform_schedule_has_equal_steps_and_survives_json(steps, start, step_type):
    schedule = FewStepSchedule.uniform(steps, step_type, start=start, is_distilled=True)
    ends = (*schedule.times[1:], 0.0)
    assert schedule.times[0] == start and len(schedule.times) == steps
    assert all(t - t_next == pytest.approx(start / steps) for t, t_next in zip(schedule.times, ends, strict=True))
    assert from_json(FewStepSchedule, json.loads(to_json(schedule))) == schedule


@pytest.mark.parametrize(
    ("times", "step_types"),
    [((), ()), ((1.0, 1.0), ("euler",) * 2), ((0.5, 0.0), ("euler",) * 2), ((1.5,), ("euler",)), ((1.0,), ())],
)
def test_invalid_few_step_schedule_is_refused(times, step_types):
    with pytest.raises(ValueError, match=r"few-step times must fall|as many step types"):
        FewStepSchedule(times=times, step_types=step_types)


def test_average_steps_jump_to_the_next_time():
    schedule = FewStepSchedule(times=(1.0, 0.6, 0.2), step_types=("average", "renoise", "average"))
    lengths = schedule.jump_lengths(torch.tensor([1.0, 0.6, 0.2 + 1e-7, 1.0]))
    assert lengths.tolist() == pytest.approx([0.4, 0.0, 0.2, 0.4], abs=1e-6)
    assert FewStepSchedule.uniform(2, "euler").jump_lengths(torch.ones(1)) is None
