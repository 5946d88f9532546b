"""When an expert of few steps is asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.diffusion.few_step import FewStepSchedule


@given(steps=st.integers(1, 60), start=st.floats(0.01, 1), way=st.sampled_from(["euler", "renoise"]))
def test_equal_steps_lead_from_the_start_to_the_clean_end_and_come_back_from_json(steps, start, way):
    course = FewStepSchedule.uniform(steps, way, start=start, is_distilled=True)
    ends = (*course.times[1:], 0.0)
    assert course.times[0] == start and len(course.times) == steps
    assert all(t - t_next == pytest.approx(start / steps) for t, t_next in zip(course.times, ends, strict=True))
    assert FewStepSchedule.parsed(course.described()) == course


@pytest.mark.parametrize(
    ("times", "step_types"),
    [((), ()), ((1.0, 1.0), ("euler",) * 2), ((0.5, 0.0), ("euler",) * 2), ((1.5,), ("euler",)), ((1.0,), ())],
)
def test_what_leads_nowhere_is_refused(times, step_types):
    with pytest.raises(ValueError, match=r"a course has times|as many ways"):
        FewStepSchedule(times=times, step_types=step_types)
