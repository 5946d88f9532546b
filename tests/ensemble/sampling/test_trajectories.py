"""What is kept of a trajectory, on a mixture of Gaussians whose posterior is known."""

from dataclasses import fields

import pytest
import torch

from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from ensemble.sampling.trajectories import RecordingEnsemble, _spread
from experts.conditions.condition import Condition
from tests.ensemble.sampling.test_sample import config, make_ensemble
from tests.oracles import IdentityCodec


@pytest.mark.parametrize(("guidance_scale", "class_ids"), [(1.0, None), (3.0, [0] * 5)])
def test_records_end_in_the_image_and_change_nothing(guidance_scale, class_ids):
    plain, condition = make_ensemble(), class_ids and Condition.of_classes(class_ids)
    settings = config("full", batch_size=2, guidance_scale=guidance_scale)
    parts = {part.name: getattr(plain, part.name) for part in fields(Ensemble)}
    recorder = RecordingEnsemble(**parts, guidance_scale=guidance_scale)
    recorded = sample(recorder, IdentityCodec(), range(5), settings, condition)
    unrecorded = sample(plain, IdentityCodec(), range(5), settings, condition)
    assert torch.equal(recorded.latents, unrecorded.latents)
    assert recorded.calls.experts == unrecorded.calls.experts
    assert list(recorder.steps) == [0, 1, 2, 3, 4]
    for seed, latents in enumerate(recorded.latents):
        steps = recorder.steps[seed]
        assert list(steps) == [1, 0.75, 0.5, 0.25]
        torch.testing.assert_close(steps[0.25][0], latents)  # Euler's last step goes to the clean prediction
        for _, gates, posterior in steps.values():
            assert torch.equal(gates, posterior)  # all experts are selected in proportion to p(k | noised, t)


def test_spread_places_begin_and_end_with_the_ends():
    assert (_spread(100, 4), _spread(3, 9), _spread(1, 9)) == ([0, 33, 66, 99], [0, 1, 2], [0])
