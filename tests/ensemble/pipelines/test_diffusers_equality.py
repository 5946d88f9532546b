"""An ensemble of one samples what diffusers' own pipeline of its network samples, from the same noise."""

from dataclasses import replace

import diffusers
import pytest
import torch

from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from experts.codec import PixelCodec
from experts.networks.registry import build_network, unpack_latents
from tests.experts.networks.test_backbones import SHAPE, config_of, text

STEPS, SCALE = 4, 3.0
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER = diffusers.FlowMatchEulerDiscreteScheduler
MASKED = ("prompt_attention_mask", "negative_prompt_attention_mask")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
SIZE = {"height": 64, "width": 64}
UNBINNED = SIZE | {"use_resolution_binning": False, "negative_prompt": None}


def no_parts(*names):
    return dict.fromkeys(names)


ENCODERS = no_parts("vae", "text_encoder", "tokenizer")
CASES = {
    "SD3Transformer2DModel": (
        diffusers.StableDiffusion3Pipeline,
        ENCODERS | no_parts("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        EULER(shift=3.0),
        POOLED,
        SIZE,
    ),
    "PixArtTransformer2DModel": (
        diffusers.PixArtSigmaPipeline,
        ENCODERS,
        diffusers.UniPCMultistepScheduler(**FLOW),
        MASKED,
        UNBINNED,
    ),
    "FluxTransformer2DModel": (
        diffusers.FluxPipeline,
        ENCODERS | no_parts("text_encoder_2", "tokenizer_2"),
        EULER(use_dynamic_shifting=True),
        POOLED,
        SIZE | {"true_cfg_scale": SCALE, "guidance_scale": 1.0},
    ),
    "SanaTransformer2DModel": (
        diffusers.SanaPipeline,
        ENCODERS,
        diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
        MASKED,
        {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "PRXTransformer2DModel": (diffusers.PRXPipeline, ENCODERS, EULER(shift=3.0), MASKED, UNBINNED),
}


@pytest.mark.parametrize("case", CASES)
def test_ensemble_of_one_equals_diffusers_own_pipeline(case):
    pipeline_class, parts, scheduler, extra, settings = CASES[case]
    rows = 1 if case == "PRXTransformer2DModel" else 2  # PRXPipeline fails with several prompts and guidance
    prompts, negative = text(rows), replace(text(rows, seed=9), mask=torch.ones(rows, 7).bool())
    if extra == MASKED:
        prompts, negative = (replace(each, pooled=each.pooled[:, :0]) for each in (prompts, negative))
    torch.manual_seed(0)
    model = build_network(config_of(case), SHAPE, 0, prompts.rows(slice(1)).drop(torch.ones(1).bool())).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ours = EnsembleDiffusionPipeline(scheduler=scheduler, codec=PixelCodec(image_shape=(8, 8, 4)), expert_0=model)
    theirs = pipeline_class(transformer=model, scheduler=type(scheduler).from_config(scheduler.config), **parts)
    fields = {name: "mask" if name in MASKED else "pooled" for name in extra}
    texts = {
        "prompt_embeds": prompts.sequence,
        "negative_prompt_embeds": negative.sequence,
        **{name: getattr(negative if "negative" in name else prompts, field) for name, field in fields.items()},
    }
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    multistep = not isinstance(scheduler, EULER)
    sigmas = {} if multistep or case == "PRXTransformer2DModel" else {"sigmas": [1.0, 0.75, 0.5, 0.25]}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(rows)]

    expected = theirs(**common | texts | sigmas | settings, generator=generators()).images
    if expected.ndim == 3:
        expected = unpack_latents(expected, (4, 4))
    if case == "PRXTransformer2DModel":
        sigmas = {"sigmas": torch.linspace(1, scheduler.sigma_min, STEPS).tolist()}
    actual = ours(**common | texts | sigmas, generator=generators()).images
    assert (actual - expected).abs().max() < 1e-5
    assert expected.abs().mean() > 0.1
