"""The ensemble as a diffusers pipeline: components, folders, noise, guidance, callbacks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from ddm_core.artifacts import list_files
from ensemble.config import SamplingConfig
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.call import check_output_type, check_selection
from ensemble.pipelines.components import expert_ids
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.sampling.prompts import Prompts
from experts.codec import PixelCodec
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.networks.registry import build_network
from experts.time_split import TimeSplitExpert
from router.config import SelectionConfig
from tests.ensemble.pipelines.conftest import SHAPE, make_ensemble, make_expert

SEEDS = [3, 1, 4, 1, 5, 9]


def sample(pipe, **arguments):
    defaults = {"seeds": SEEDS, "class_labels": [0, 1, "a", "b", None, 0], "num_inference_steps": 4}
    return pipe(**defaults | {"guidance_scale": 2.0} | arguments).latents


def test_experts_are_components_of_diffusers(pipe):
    assert expert_ids(pipe.components) == [0, 1, 2]
    assert type(pipe.expert_1).__name__ == "DiTTransformer2DModel"
    assert set(pipe.components) - {f"expert_{k}" for k in range(3)} == {"scheduler", "codec", "router", "text_encoder"}
    again = EnsembleDiffusionPipeline(**pipe.components, class_names=pipe.class_names)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), sample(pipe))


@pytest.mark.parametrize("selection", ["sticky", "full", "top_k"])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_samples_are_those_of_our_solvers(pipe, selection, solver):
    if solver == "heun":
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    config = SamplingConfig(solver=solver, steps=4, selection=SelectionConfig(name=selection), guidance_scale=2.0)
    expected = make_ensemble()(SEEDS, config, Prompts.of_classes([0, 1, 0, 1, -1, 0]))
    output = pipe(
        seeds=SEEDS,
        class_labels=[0, 1, "a", "b", None, 0],
        num_inference_steps=4,
        guidance_scale=2.0,
        selection=selection,
    )
    assert (output.latents - expected.latents).abs().max() < 1e-5
    assert output.call_counts.experts == expected.calls.experts
    assert output.call_counts.router == expected.calls.router


def test_ensemble_of_one_equals_diffusers_loop():
    expert = make_expert(0)
    ours = EnsembleDiffusionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), codec=make_ensemble().codec, expert_0=expert.model
    )
    ours.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sigmas = np.linspace(1, 1 / 1000, 5).tolist()
    mine = ours(class_labels=[0, 1], generator=generators, num_inference_steps=5, guidance_scale=3.0, sigmas=sigmas)
    latents = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    reference = reference_loop(expert.model, latents, torch.tensor([0, 1]), 5, 3.0)
    assert (mine.latents - reference).abs().max() < 1e-6


def reference_loop(model, latents, labels, steps, scale):
    """Sample as diffusers' class-conditional pipelines do, with the model's own null class."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            both = model(
                torch.cat([latents, latents]),
                timestep=timestep.expand(2 * len(labels)),
                class_labels=torch.cat([labels, torch.full_like(labels, 2)]),
            ).sample
        conditional, unconditional = both.chunk(2)
        velocity = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    return latents


def test_saved_pipeline_loads_to_the_same_samples(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    loaded = EnsembleDiffusionPipeline.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    (tmp_path / "second").rename(tmp_path / "moved")
    moved = EnsembleDiffusionPipeline.from_pretrained(tmp_path / "moved")
    for other in (loaded, moved):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(sample(other), sample(pipe))
        assert other.class_names == ("a", "b")
    for file in list_files(tmp_path / "first"):
        assert file.read_bytes() == (tmp_path / "moved" / file.relative_to(tmp_path / "first")).read_bytes(), file


@pytest.mark.parametrize("batch_size", [1, 2, 4, 256])
@pytest.mark.parametrize("selection", ["sticky", "full"])
def test_image_depends_on_its_seed_alone(pipe, batch_size, selection):
    together = sample(pipe, selection=selection)
    pipe.sampling = SamplingConfig(batch_size=batch_size)
    assert (sample(pipe, selection=selection) - together).abs().max() < 1e-6
    alone = sample(pipe, seeds=[4], class_labels=["a"], selection=selection)
    assert (alone - together[2:3]).abs().max() < 1e-6


def test_generators_give_the_noise_of_their_seeds(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    assert torch.equal(sample(pipe, seeds=None, generator=generators), sample(pipe))
    one = pipe(class_labels=["a"] * 3, generator=torch.Generator().manual_seed(3), num_inference_steps=2).latents
    first = pipe(class_labels="a", seeds=[3], num_inference_steps=2).latents
    assert (one[:1] - first).abs().max() < 1e-6
    assert not torch.allclose(one[0], one[1])


def test_output_types_hold_the_same_image(pipe):
    by_type = {kind: pipe(seeds=[2], num_inference_steps=2, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert by_type["np"].images.shape == (1, 4, 4, 1)
    assert torch.equal(by_type["pt"].images[0, 0], torch.from_numpy(by_type["np"].images[0, :, :, 0]))
    assert (np.asarray(by_type["pil"].images[0]) == (by_type["np"].images[0, :, :, 0] * 255).round()).all()
    assert torch.equal(by_type["latent"].images, by_type["pil"].latents)
    assert len(pipe(seeds=[2], num_inference_steps=2, return_dict=False)) == 1


def test_guidance_interval_calls_the_other_branch_inside_only(pipe):
    arguments = {"class_labels": "a", "seeds": [0, 1], "num_inference_steps": 8, "guidance_scale": 3.0}
    everywhere = pipe(**arguments).call_counts.experts.total()
    inside = pipe(**arguments, guidance_interval=(0.3, 0.8))
    nowhere = pipe(**arguments, guidance_interval=(0.0, 0.0))
    plain = pipe(**arguments | {"guidance_scale": 1.0})
    assert (everywhere, plain.call_counts.experts.total()) == (32, 16)
    assert inside.call_counts.experts.total() == 16 + 2 * 4  # t = .75, .625, .5, .375
    assert torch.equal(nowhere.latents, plain.latents)


def test_callback_gets_and_replaces_tensors(pipe):
    seen = []

    def zero_at_the_end(_pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["gates"].sum(1).tolist()))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    output = pipe(
        seeds=[0, 1],
        num_inference_steps=4,
        callback_on_step_end=zero_at_the_end,
        callback_on_step_end_tensor_inputs=["latents", "gates"],
    )
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == [1000, 750, 500, 250]
    assert all(sums == [1, 1] for *_, sums in seen)
    assert not output.latents.any()
    with pytest.raises(PipelineError, match="a callback can get latents"):
        pipe(callback_on_step_end=zero_at_the_end, callback_on_step_end_tensor_inputs=["noise"])


def test_callback_can_interrupt(pipe):
    steps = []

    def stop(pipeline, step, _timestep, _tensors):
        steps.append(step)
        pipeline._interrupt = True

    pipe(seeds=[0], num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"class_labels": "zebra"}, "is not a class"),
        ({"class_labels": [5]}, "from 0 to 1"),
        ({"prompt": "a cat"}, "no text encoder"),
        ({"prompt_embeds": torch.zeros(1, 2, 3)}, "without text"),
        ({"seeds": [1, 2], "class_labels": [0]}, "one of each"),
        ({"seeds": []}, r"at least one image; got {'seeds': 0}"),
        ({"num_images_per_prompt": 0}, "at least one image"),
        ({"num_inference_steps": 0}, "must be at least 1; got 0"),
    ],
)
def test_unfit_inputs_are_refused_with_the_reason(pipe, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        pipe(**{"num_inference_steps": 1} | arguments)


def test_unknown_output_type_is_refused():
    with pytest.raises(ValueError, match="must be one of pil, np, pt, latent; got jpeg"):
        check_output_type("jpeg")


def test_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="selection must be one of full, top_k, .*; got nonsense"):
        check_selection("nonsense")


def test_components_of_other_kinds_are_refused(pipe):
    with pytest.raises(PipelineError, match="must be an expert or a network"):
        EnsembleDiffusionPipeline(scheduler=pipe.scheduler, codec=pipe.codec, expert_0="a path")


def test_networks_of_any_size_sample_other_sizes(pipe):
    text = TextEmbedding(torch.randn(1, 7, 24), torch.ones(1, 7).bool(), torch.randn(1, 20), torch.zeros(1).bool())
    settings = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "caption_projection_dim": 32}
    network = build_network(DiffusersConfig(class_name="SD3Transformer2DModel", settings=settings), (4, 8, 8), 0, text)
    sized = EnsembleDiffusionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), codec=PixelCodec(image_shape=(8, 8, 4)), expert_0=network
    )
    sized.set_progress_bar_config(disable=True)
    output = sized(seeds=[1], height=16, width=12, num_inference_steps=2, output_type="np")
    assert output.images.shape == (1, 16, 12, 4)
    assert output.latents.shape == (1, 4, 16, 12)
    with pytest.raises(PipelineError, match="must be 4 x 4, not 8 x 4: DiTTransformer2DModel takes one size"):
        pipe(seeds=[1], height=8)


def test_experts_of_several_networks_are_one_component(tmp_path):
    ours = make_ensemble()
    few_step = FewStepSchedule.uniform(2, "renoise", is_distilled=True)
    split = {
        k: TimeSplitExpert(experts=[make_expert(k), make_expert(k + 3)], bounds=[0.5], few_step=few_step)
        for k in range(3)
    }
    pipeline = replace(ours, ensemble=replace(ours.ensemble, experts=split))
    expected = pipeline(SEEDS, SamplingConfig(), Prompts.of_classes([0, 1, 0, 1, -1, 0])).latents
    pipe = EnsembleDiffusionPipeline.from_ensemble(pipeline).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    arguments = {"seeds": SEEDS, "class_labels": [0, 1, 0, 1, -1, 0]}
    assert (pipe(**arguments).latents - expected).abs().max() < 1e-5
    pipe.save_pretrained(tmp_path / "split")
    again = EnsembleDiffusionPipeline.from_pretrained(tmp_path / "split")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**arguments).latents, pipe(**arguments).latents)
    with pytest.raises(PipelineError, match="leave it out"):
        pipe(**arguments, num_inference_steps=3)
    with pytest.raises(PipelineError, match="guidance is part"):
        pipe(**arguments, guidance_scale=3.0)
    size = sum(file.stat().st_size for file in (tmp_path / "split" / "expert_0").rglob("*.safetensors"))
    with pytest.raises(PipelineError, match="several networks, which are not paged"):
        EnsembleDiffusionPipeline.from_pretrained(tmp_path / "split", max_memory=2 * size)
