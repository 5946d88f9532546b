"""Tiny random networks in diffusers' own pipelines, and in an ensemble of one, from the same noise and texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from experts.codec import PixelCodec
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.registry import build_network, unpack_latents
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router

STEPS, SCALE, SIDE, CHANNELS, TOKENS, WIDTH, POOLED = 4, 3.0, 8, 4, 7, 24, 20
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER = diffusers.FlowMatchEulerDiscreteScheduler
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SIZE = {"height": 8 * SIDE, "width": 8 * SIDE}


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCase:
    """A class of network, its pipeline in diffusers, and how both are called."""

    settings: Mapping[str, Any]
    pipeline: Any
    scheduler: Any
    is_pooled: bool = False
    """Whether texts have a pooled vector; else they have a mask."""
    encoders: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of a call of diffusers' pipeline."""
    rows: int = 2


CASES: dict[str, PipelineCase] = {
    "SD3Transformer2DModel": PipelineCase(
        settings={**HEADS, "caption_projection_dim": 32, "qk_norm": "rms_norm"},
        pipeline=diffusers.StableDiffusion3Pipeline,
        scheduler=EULER(shift=3.0),
        is_pooled=True,
        encoders=3,
        arguments=SIZE,
    ),
    "PixArtTransformer2DModel": PipelineCase(
        settings={**HEADS, "cross_attention_dim": 32},
        pipeline=diffusers.PixArtSigmaPipeline,
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW),
        arguments=SIZE | {"use_resolution_binning": False, "negative_prompt": None},
    ),
    "FluxTransformer2DModel": PipelineCase(
        settings={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "axes_dims_rope": [4, 6, 6],
        },
        pipeline=diffusers.FluxPipeline,
        scheduler=EULER(use_dynamic_shifting=True),
        is_pooled=True,
        encoders=2,
        arguments=SIZE | {"true_cfg_scale": SCALE, "guidance_scale": 1.0},
    ),
    "SanaTransformer2DModel": PipelineCase(
        settings={
            **HEADS,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
        },
        pipeline=diffusers.SanaPipeline,
        scheduler=diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
        arguments={
            "height": 32 * SIDE,
            "width": 32 * SIDE,
            "use_resolution_binning": False,
            "negative_prompt": None,
        },
    ),
    "PRXTransformer2DModel": PipelineCase(
        settings={"hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
        pipeline=diffusers.PRXPipeline,
        scheduler=EULER(shift=3.0),
        arguments=SIZE | {"use_resolution_binning": False, "negative_prompt": None},
        rows=1,  # PRXPipeline fails with several prompts and guidance
    ),
}


def sample_both(name: str) -> tuple[Tensor, Tensor]:
    """Return the latents of the ensemble of one, and of diffusers' own pipeline."""
    case = CASES[name]
    texts = {"": _text(case, 1), "negative_": _text(case, 9)}
    network = _random_network(name, texts[""])
    scheduler = type(case.scheduler).from_config(case.scheduler.config)
    ours = EnsembleDiffusionPipeline(
        scheduler=case.scheduler, codec=PixelCodec(image_shape=(SIDE, SIDE, CHANNELS)), expert_0=network
    )
    parts = ("text_encoder", "tokenizer")
    others = {f"{part}_{number}": None for number in range(2, case.encoders + 1) for part in parts}
    theirs = case.pipeline(
        transformer=network, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, **others
    )
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    for prefix, text in texts.items():
        arguments[f"{prefix}prompt_embeds"] = text.sequence
        arguments |= (
            {f"{prefix}pooled_prompt_embeds": text.pooled}
            if case.is_pooled
            else {f"{prefix}prompt_attention_mask": text.mask}
        )
    latents = [
        _sample(ours, arguments | _our_sigmas(name, case), case.rows),
        _sample(theirs, arguments | _their_sigmas(name, case) | dict(case.arguments), case.rows),
    ]
    grid = (SIDE // 2, SIDE // 2)
    return latents[0], unpack_latents(latents[1], grid) if latents[1].ndim == 3 else latents[1]


def build_ensemble(name: str, experts: int) -> tuple[EnsembleDiffusionPipeline, dict[str, Tensor]]:
    """Return an ensemble of random networks of one class with a prior as router, and the text of one prompt."""
    case = CASES[name]
    text = _text(case, 1).rows(slice(1))
    networks: dict[str, Any] = {f"expert_{k}": _random_network(name, text, k) for k in range(experts)}
    router = Router(
        model=build_router(RouterConfig(kind="prior_table"), (CHANNELS, SIDE, SIDE), experts, 0, text),
        noise_schedule=RECTIFIED_FLOW,
        prior_counts=torch.ones(1, experts, dtype=torch.float64),
    )
    pipeline = EnsembleDiffusionPipeline(
        scheduler=EULER(shift=3.0), codec=PixelCodec(image_shape=(SIDE, SIDE, CHANNELS)), router=router, **networks
    )
    pipeline.set_progress_bar_config(disable=True)
    inputs = {"prompt_embeds": text.sequence}
    if case.is_pooled:
        return pipeline, inputs | {"pooled_prompt_embeds": text.pooled}
    return pipeline, inputs | {"prompt_attention_mask": text.mask}


def _sample(pipeline: Any, arguments: Mapping[str, Any], rows: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(rows)]
    latents: Tensor = pipeline(**arguments, generator=generators).images
    return latents


def _our_sigmas(name: str, case: PipelineCase) -> dict[str, Any]:
    """Return diffusers' own times for a pipeline that takes none of ours: its scheduler's, from 1 to its smallest."""
    if name == "PRXTransformer2DModel":
        return {"sigmas": torch.linspace(1, case.scheduler.sigma_min, STEPS).tolist()}
    return _their_sigmas(name, case)


def _their_sigmas(name: str, case: PipelineCase) -> dict[str, Any]:
    takes_sigmas = isinstance(case.scheduler, EULER) and name != "PRXTransformer2DModel"
    return {"sigmas": [1 - step / STEPS for step in range(STEPS)]} if takes_sigmas else {}


def _random_network(name: str, text: TextEmbedding, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    null = text.rows(slice(1)).drop(torch.ones(1).bool())
    network = build_network(
        DiffusersConfig(class_name=name, settings=dict(CASES[name].settings)), (CHANNELS, SIDE, SIDE), 0, null
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def _text(case: PipelineCase, seed: int) -> TextEmbedding:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([TOKENS, 4])[: case.rows]
    return TextEmbedding(
        torch.randn(case.rows, TOKENS, WIDTH, generator=generator),
        torch.arange(TOKENS) < lengths[:, None],
        torch.randn(case.rows, POOLED if case.is_pooled else 0, generator=generator),
        torch.zeros(case.rows, dtype=torch.bool),
    )
