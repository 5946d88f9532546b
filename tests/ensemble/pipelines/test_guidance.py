"""Guidance of the ensemble's velocity: diffusers' guiders, and a weak model in place of the null condition."""

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    TangentialClassifierFreeGuidance,
)

from ensemble.ensemble import Ensemble
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.solvers import make_noise
from experts.conditions.condition import Condition
from router.config import SelectionConfig
from tests.ensemble.pipelines.conftest import SHAPE, make_ensemble, make_expert

ARGUMENTS = {"seeds": [3, 1, 4], "class_labels": "a", "num_inference_steps": 4}


def test_classifier_free_guider_equals_the_scale(pipe):
    by_scale = pipe(**ARGUMENTS, guidance_scale=3.0)
    by_guider = pipe(**ARGUMENTS, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    assert (by_scale.latents - by_guider.latents).abs().max() < 1e-5
    assert by_scale.call_counts.experts == by_guider.call_counts.experts


@pytest.mark.parametrize(
    "guider",
    [
        AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5),
        ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
        TangentialClassifierFreeGuidance(guidance_scale=3.0),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_guider_changes_samples_and_keeps_no_state(pipe, guider):
    first, second = (pipe(**ARGUMENTS, guider=guider).latents for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert (first - pipe(**ARGUMENTS, guidance_scale=3.0).latents).abs().max() > 1e-3
    alone = pipe(**ARGUMENTS | {"seeds": [1]}, guider=guider).latents
    assert (alone - first[1:2]).abs().max() < 1e-5


def test_guider_with_start_and_stop_skips_the_other_branch(pipe):
    guider = ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75)
    assert pipe(**ARGUMENTS, guider=guider).call_counts.experts.total() == 3 * (4 + 2)


def weak_pipeline():
    """One expert with other parameters, as a monolith or an early checkpoint would be."""
    ours = make_ensemble()
    single = Ensemble(experts={0: make_expert(9)}, noise_schedule=ours.ensemble.noise_schedule)
    return EnsembleDiffusionPipeline.from_ensemble(
        EnsemblePipeline(ensemble=single, codec=ours.codec, num_classes=2, class_names=("a", "b"))
    )


def test_autoguidance_extrapolates_from_the_weak_velocity(pipe):
    weak, scale = weak_pipeline(), 2.5
    output = pipe(**ARGUMENTS, weak=weak, guidance_scale=scale, selection="full")
    noised, condition = make_noise(ARGUMENTS["seeds"], SHAPE), Condition(torch.zeros(3, dtype=torch.int64))
    routings = [
        ensemble.init_routing(ARGUMENTS["seeds"], condition, SelectionConfig(name="full"))
        for ensemble in (pipe.ensemble, weak.ensemble)
    ]
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            strong, other = (
                ensemble.velocity(noised, torch.full((3,), t), condition, routing)
                for ensemble, routing in zip((pipe.ensemble, weak.ensemble), routings, strict=True)
            )
            noised = noised - 0.25 * (other + scale * (strong - other))
    assert (output.latents - noised).abs().max() < 1e-5
    assert output.call_counts.weak.experts.total() == 3 * 4


def test_autoguidance_of_itself_changes_nothing(pipe):
    plain = pipe(**ARGUMENTS, guidance_scale=1.0).latents
    assert (pipe(**ARGUMENTS, weak=pipe, guidance_scale=4.0).latents - plain).abs().max() < 1e-5


def test_conflicting_guidance_is_refused(pipe):
    with pytest.raises(PipelineError, match="leave guidance_scale out"):
        pipe(**ARGUMENTS, guider=ClassifierFreeGuidance(), guidance_scale=2.0)
    with pytest.raises(PipelineError, match="changes the layers"):
        pipe(**ARGUMENTS, guider=PerturbedAttentionGuidance(perturbed_guidance_layers=[0]))
    with pytest.raises(PipelineError, match="from 0 to 1"):
        pipe(**ARGUMENTS, guidance_interval=(0.5, 2.0))
    with pytest.raises(PipelineError, match="negative"):
        pipe(**ARGUMENTS, weak=weak_pipeline(), negative_prompt_embeds=torch.zeros(1, 2, 3))
