"""A budget of memory for the experts: which are loaded, when, and that samples do not depend on it."""

import pytest
import torch
from safetensors.torch import save_file

from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.paging import weight_bytes
from tests.ensemble.pipelines.test_lora import LAYERS, lora_of

ARGUMENTS = {"seeds": range(10), "class_labels": ["a", "b"] * 5, "num_inference_steps": 4, "guidance_scale": 2.0}


def load(folder, experts_in_memory=None):
    largest = max(weight_bytes(folder / f"expert_{k}") for k in range(3))
    max_memory = None if experts_in_memory is None else experts_in_memory * largest
    pipe = EnsembleDiffusionPipeline.from_pretrained(folder, max_memory=max_memory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_enough_memory_loads_all(folder):
    pipe = load(folder, 3)
    assert pipe.residency("sticky")[0] == "all"
    assert pipe.expert_1 is not None
    assert load(folder).residency("sticky")[0] == "all"


def test_sticky_loads_every_expert_once(folder):
    expected, pipe = load(folder)(**ARGUMENTS), load(folder, 1)
    mode, reason = pipe.residency("sticky")
    assert mode == "grouped" and "one after the other" in reason
    output = pipe(**ARGUMENTS)
    assert (output.latents - expected.latents).abs().max() < 1e-6
    assert output.call_counts.experts == expected.call_counts.experts
    assert pipe.pager.loads == len(output.call_counts.experts) == 3
    assert len(pipe.pager.loaded) == 1
    assert expected.latents.shape == output.latents.shape


@pytest.mark.parametrize(("memory", "loads"), [(1, 12), (2, 8)])
def test_other_selections_load_by_need(folder, memory, loads):
    expected, pipe = load(folder)(**ARGUMENTS, selection="full"), load(folder, memory)
    assert pipe.residency("full")[0] == "paged"
    output = pipe(**ARGUMENTS, selection="full")
    assert (output.latents - expected.latents).abs().max() < 1e-6
    assert len(pipe.pager.loaded) == memory
    assert pipe.pager.loads == pytest.approx(loads, abs=4)


def test_expert_larger_than_the_budget_is_refused(folder):
    with pytest.raises(PipelineError, match="alone has .* MB of weights, more than max_memory"):
        EnsembleDiffusionPipeline.from_pretrained(folder, max_memory=1000)


def test_paged_pipeline_saves_its_experts(folder, tmp_path):
    pipe = load(folder, 1)
    pipe.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(**ARGUMENTS).latents, load(folder)(**ARGUMENTS).latents)


def test_adapters_follow_experts_that_are_paged(folder, tmp_path):
    whole, pipe = load(folder), load(folder, 1)
    plain = whole(**ARGUMENTS).latents
    for seed, experts, name in ((0, None, "first"), (1, [1], "second")):
        save_file(lora_of(whole.expert_0, LAYERS, seed=seed), tmp_path / f"{name}.safetensors")
        for each in (whole, pipe):
            each.load_lora_weights(tmp_path / f"{name}.safetensors", experts=experts, adapter_name=name, weight=0.5)
    assert pipe.get_list_adapters() == whole.get_list_adapters()
    full = {**ARGUMENTS, "selection": "full"}
    for change in (lambda _: None, lambda each: each.set_adapters(["second"], [0.25])):
        change(whole)
        change(pipe)
        assert (pipe(**full).latents - whole(**full).latents).abs().max() < 1e-6
        assert (pipe(**ARGUMENTS).latents - whole(**ARGUMENTS).latents).abs().max() < 1e-6
        assert (whole(**ARGUMENTS).latents - plain).abs().max() > 0.01
    with pytest.raises(PipelineError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "out")
    pipe.unload_lora_weights()
    assert (pipe(**ARGUMENTS).latents - plain).abs().max() < 1e-6
    assert pipe.get_list_adapters() == {}
