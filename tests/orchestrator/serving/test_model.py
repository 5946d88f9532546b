from collections.abc import Iterator

import pytest
import torch

from ensemble.config import SamplingConfig
from ensemble.sampling.prompts import Prompts
from ensemble.sampling.sample import sample
from orchestrator.serving.backend import open_pager
from orchestrator.serving.config import Limits
from orchestrator.serving.model import ANY_EXPERT, ServedModel
from orchestrator.serving.request import ImageRequest, check_request
from orchestrator.serving.sources import ModelSource
from tests.ensemble.text_pipeline import assemble_text_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[ServedModel]:
    root = tmp_path_factory.mktemp("model")
    assemble_text_pipeline(root)
    source = ModelSource(
        name="tiny", folder=root / "pipeline", sampling=SamplingConfig(steps=3, guidance_scale=2.0, solver="euler")
    )
    return ServedModel.open(source, 16, open_pager([source], 1))


def plan(model, **fields):
    return model.plan(check_request(ImageRequest(prompt="a boot", **fields), model.facts, Limits()))


@pytest.mark.parametrize("selection", ["sticky", "full", "threshold"])
def test_latents_are_equal_to_the_bit_in_every_batch(model, selection):
    planned = plan(model, n=16, seeds=list(range(16)), selection=selection)
    groups = {}
    for key, job in planned:
        groups.setdefault(key, []).append(job)
    assert {key.expert for key in groups} == ({0, 1} if selection == "sticky" else {ANY_EXPERT})
    for key, jobs in groups.items():
        batch = model.denoise(key, jobs)
        for count in (1, 3):
            assert torch.equal(torch.cat(model.denoise(key, jobs[:count])), torch.cat(batch[:count]))
        assert torch.equal(model.denoise(key, jobs[::-1])[0], batch[-1])


def test_images_are_those_of_the_sampler(model):
    planned = plan(model, n=6, seeds=list(range(6)))
    latents = torch.cat([model.denoise(key, [job])[0] for key, job in planned])
    condition = model.pipeline.condition(Prompts.of_captions(["a boot"] * 6))
    sampled = sample(model.pipeline.ensemble, model.pipeline.codec, range(6), model.source.sampling, condition)
    assert torch.allclose(latents, sampled.latents, atol=1e-5)
    gates = model.pipeline.ensemble.init_routing(range(6), condition, model.source.sampling.selection).gates
    assert [key.expert for key, _ in planned] == gates.argmax(1).tolist()


def test_one_expert_of_two_is_in_memory(model):
    for key, job in plan(model, n=8, seeds=list(range(8))):
        model.denoise(key, [job])
        pager = model.pipeline.ensemble.experts[key.expert].pager
        assert [folder.name for folder in pager.loaded] == [f"expert_{key.expert}"]


def test_a_null_prompt_has_no_guidance(model):
    generation = check_request(ImageRequest(prompt=" "), model.facts, Limits())
    assert [key.guidance_scale for key, _ in model.plan(generation)] == [1.0]
