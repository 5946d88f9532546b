"""Batches of images whose experts are known: full calls, every image once, in the order of its seed."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.batches import plan_batches
from ensemble.sampling.sample import sample
from experts.codec import PixelCodec
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from tests.oracles import Oracle, OracleRouter


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12), st.booleans())
def test_every_image_is_in_one_batch(experts, batch_size, one_expert):
    gates = torch.nn.functional.one_hot(torch.tensor(experts), 4).float()
    batches = plan_batches(len(experts), batch_size, gates, one_expert=one_expert)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(experts)))
    assert all(0 < len(rows) <= batch_size for rows in batches)
    calls = [{experts[row] for row in rows.tolist()} for rows in batches]
    if len(experts) > batch_size:
        assert sum(map(len, calls)) == sum(-(-count // batch_size) for count in Counter(experts).values())
    if one_expert:
        assert all(len(called) == 1 for called in calls)


def test_sticky_calls_networks_on_full_batches():
    means = torch.tensor([[-1.0] * 4, [1.0] * 4]).reshape(2, 1, 2, 2)
    experts = {k: Oracle(mean=mean, deviation=0.5, latent_shape=(1, 2, 2)) for k, mean in enumerate(means)}
    router = OracleRouter(means=means, deviations=(0.5, 0.5), shares=(0.5, 0.5))
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=router)
    codec = PixelCodec(image_shape=(2, 2, 1))

    def latents_and_calls(batch_size):
        for expert in experts.values():
            expert.calls = 0
        config = SamplingConfig(solver="euler", steps=1, batch_size=batch_size)
        result = sample(ensemble, codec, range(64), config)
        return result.latents, sum(expert.calls for expert in experts.values())

    together, _ = latents_and_calls(64)
    batched, calls = latents_and_calls(8)
    assert torch.allclose(batched, together, atol=1e-6)
    assert calls <= 64 // 8 + 1
