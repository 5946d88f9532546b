import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ensemble.config import ReflectionConfig, SamplingConfig
from ensemble.sampling.images import to_bytes
from ensemble.sampling.prompts import Prompts
from orchestrator.serving.backend import open_pager
from orchestrator.serving.config import Limits
from orchestrator.serving.model import ANY_EXPERT, ServedModel
from orchestrator.serving.request import ImageRequest, check_request
from orchestrator.serving.sources import ModelSource
from router.config import SelectionConfig, SelectionName
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
    groups = group(plan(model, n=16, seeds=list(range(16)), selection=selection))
    assert {key.expert for key in groups} == ({0, 1} if selection == "sticky" else {ANY_EXPERT})
    for key, jobs in groups.items():
        batch = model.denoise(key, jobs)
        for count in (1, 3):
            assert torch.equal(torch.cat(model.denoise(key, jobs[:count])), torch.cat(batch[:count]))
        assert torch.equal(model.denoise(key, jobs[::-1])[0], batch[-1])


@pytest.mark.parametrize("selection", get_args(SelectionName))
def test_images_are_those_of_the_sampler(model, selection):
    sampling = replace(model.source.sampling, selection=SelectionConfig(name=selection))
    check_images(model, sampling, selection=selection)


def test_the_expert_of_a_sticky_image_is_known_first(model):
    condition = model.pipeline.condition(Prompts.of_captions(["a boot"] * 6))
    gates = model.pipeline.ensemble.init_routing(range(6), condition, model.source.sampling.selection).gates
    assert [key.expert for key, _ in plan(model, n=6, seeds=list(range(6)))] == gates.argmax(1).tolist()


@pytest.mark.parametrize(("weak", "selection"), [("expert", "full"), ("early", "sticky"), ("folder", "sticky")])
def test_reflections_are_those_of_the_sampler(model, tmp_path, weak, selection):
    folder = shutil.copytree(model.source.folder, tmp_path / "pipeline")
    for k in (0, 1):
        shutil.copytree(folder / f"expert_{k}", tmp_path / "early")
        (tmp_path / "early").rename(folder / f"expert_{1 - k}" / "early")
    path = str(folder / "expert_1") if weak == "folder" else ""
    plain = replace(model.source.sampling, selection=SelectionConfig(name=selection))
    sampling = replace(plain, reflection=ReflectionConfig(weak=weak, path=path, steps=1))
    source = replace(model.source, folder=folder, sampling=sampling)
    reflected = ServedModel.open(source, 16, open_pager([source], None))
    images = check_images(reflected, sampling)
    assert np.abs(images - check_images(model, plain, selection=selection)).max() > 10
    key, jobs = next(iter(group(plan(reflected, n=6, seeds=list(range(6)))).items()))
    assert torch.equal(reflected.denoise(key, jobs)[-1], reflected.denoise(key, jobs[-1:])[0])


def group(planned):
    groups = {}
    for key, job in planned:
        groups.setdefault(key, []).append(job)
    return groups


def check_images(model, sampling, **fields):
    """Compare images with the sampler's, up to one level, and return them."""
    planned = plan(model, n=6, seeds=list(range(6)), **fields)
    by_seed = {}
    for key, jobs in group(planned).items():
        by_seed |= zip([job.seed for job in jobs], model.denoise(key, jobs), strict=True)
    latents = [by_seed[seed] for seed in range(6)]
    files = model.decode(latents, [("png", 100)] * 6)
    served = np.stack([np.array(Image.open(io.BytesIO(file)), dtype=int) for file in files])
    sampled = model.pipeline(range(6), sampling, Prompts.of_captions(["a boot"] * 6))
    assert torch.allclose(torch.cat(latents), sampled.latents, atol=1e-5)
    assert np.abs(served - to_bytes(sampled.images)[..., 0]).max() <= 1
    return served


def test_one_expert_of_two_is_in_memory(model):
    for key, job in plan(model, n=8, seeds=list(range(8))):
        model.denoise(key, [job])
        pager = model.pipeline.ensemble.experts[key.expert].pager
        assert [folder.name for folder in pager.loaded] == [f"expert_{key.expert}"]


def test_a_null_prompt_has_no_guidance(model):
    generation = check_request(ImageRequest(prompt=" "), model.facts, Limits())
    assert [key.guidance_scale for key, _ in model.plan(generation)] == [1.0]
