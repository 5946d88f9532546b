"""Export an ensemble with a `pipeline.py` of its own, which plain diffusers runs if a reader allows remote code.

The file is generated for one class of network and K experts from the functions that sample here. Nothing that we load
ever runs it: `trusted_files` refuses folders with code.
"""

import inspect
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddm_core.artifacts import atomic_folder, read_json, write_json
from ensemble.pipeline_folder import INDEX, PipelineError
from ensemble.pipelines.components import expert_name
from ensemble.routing import INITIAL_LEVEL
from experts.codec import PixelCodec
from experts.codecs.autoencoder import AutoencoderCodec, _shift_and_scale
from experts.compressed.quantization.registry import quantized_modules
from experts.conditions.condition import Condition
from experts.networks.adapters.adapter import Adapter, CallInputs, pixel_sizes, position_ids
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.registry import PACKED_SIDE, call_adapted, pack_latents, unpack_latents

TEMPLATE = '''"""Sampling of an ensemble of {count} experts, {network}; generated, it needs diffusers alone.

Each image is sampled by one expert, drawn from the experts' shares of the data by the image's seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

NAMES = {names}
PACKED_SIDE = {packed_side}
LEVEL = {level}
MASK = 2**64 - 1


{sources}

ADAPTER = SimpleNamespace(
    packs={packs}, is_flat={is_flat}, sign={sign}, timestep=lambda t: {timestep}, arguments={arguments}
)


@dataclass
class Condition:
    class_id: Any
    text: Any = None

{embedding_index}

def mix(number):
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)


def splitmix(number):
    return mix(number + 0x9E3779B97F4A7C15 & MASK)


def draw_expert(seed, counts):
    """Draw an expert by its share of the data; the same seed draws the same expert."""
    uniform = (splitmix(splitmix(splitmix(seed & MASK) ^ splitmix(LEVEL))) >> 11) / 2**53
    cumulative = torch.tensor(counts, dtype=torch.float64).log().softmax(-1).cumsum(-1)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(counts) - 1))


class DDMPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "codec"
    _optional_components = ["codec", *NAMES]

    def __init__(self, scheduler, {parameters}, codec=None, prior=None, latent_shape=None, decoder=None):
        super().__init__()
        self.register_modules(scheduler=scheduler, codec=codec, {registered})
        self.register_to_config(prior=prior, latent_shape=latent_shape, decoder=decoder)

    @torch.no_grad()
    def __call__(
        self,
        seeds,
        class_labels=None,
        prompt_embeds=None,
        prompt_attention_mask=None,
        pooled_prompt_embeds=None,
        negative_prompt_embeds=None,
        negative_prompt_attention_mask=None,
        negative_pooled_prompt_embeds=None,
        num_inference_steps=25,
        guidance_scale=1.0,
        output_type="pil",
    ):
        """Sample one image per seed; classes are numbers, -1 for none, and texts are embeddings."""
        seeds, count = list(seeds), len(seeds)
        labels = torch.full((count,), -1) if class_labels is None else torch.as_tensor(class_labels).expand(count)
        text = self._text(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        other = self._text(negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds)
        counts = self.config.prior
        drawn = torch.tensor([draw_expert(seed, counts[label]) for seed, label in zip(seeds, labels.tolist())])
        latents = torch.stack(
            [torch.randn(self.config.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(self.device)
        self.scheduler.set_timesteps(sigmas=[1 - step / num_inference_steps for step in range(num_inference_steps)])
        for timestep in self.progress_bar(self.scheduler.timesteps):
            t = timestep / self.scheduler.config.num_train_timesteps
            velocity = torch.zeros_like(latents)
            for index in drawn.unique().tolist():
                rows = (drawn == index).nonzero()[:, 0]
                network = getattr(self, NAMES[index])
                inputs = ADAPTER, network, latents[rows], t.expand(len(rows))
                called = call_adapted(*inputs, self._rows(labels, text, rows))
                if guidance_scale != 1:
                    base = call_adapted(*inputs, self._rows(torch.full_like(labels, -1), other, rows))
                    called = base + guidance_scale * (called - base)
                velocity[rows] = called
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if output_type == "latent":
            return SimpleNamespace(images=latents)
        images = self._decode(latents).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return SimpleNamespace(images=self.numpy_to_pil(images) if output_type == "pil" else images)

    def _decode(self, latents):
        if self.codec is None:
            return latents
        shift, scale = (torch.tensor(self.config.decoder[name]).view(-1, 1, 1) for name in ("shift", "scale"))
        return self.codec.decode(latents / scale + shift, return_dict=False)[0]

    def _text(self, sequence, mask, pooled):
        if sequence is None:
            return None
        mask = torch.ones(sequence.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return SimpleNamespace(sequence=sequence, mask=mask, pooled=pooled)

    def _rows(self, labels, text, rows):
        if text is None:
            return Condition(labels[rows])
        values = {{name: None if value is None else value[rows] for name, value in vars(text).items()}}
        return Condition(labels[rows], SimpleNamespace(**values))
'''


def export_pipeline(pipeline: Any, out: str | os.PathLike[str]) -> None:
    """Write the pipeline's folder with a generated `pipeline.py`, for readers without this package.

    It samples with one expert an image and flow matching's Euler steps. Raises `PipelineError` for experts or codecs
    that plain diffusers does not have, and for another scheduler or noise schedule.
    """
    adapter = _check_exportable(pipeline)
    with atomic_folder(Path(out).expanduser()) as temporary:
        pipeline.save_pretrained(temporary)
        for name in ("router", "shared"):
            shutil.rmtree(temporary / name, ignore_errors=True)
        index = _index(pipeline, read_json(temporary / INDEX), adapter)
        codec = pipeline.to_ensemble_pipeline().codec
        if isinstance(codec, AutoencoderCodec):
            shutil.move(temporary / "codec" / "autoencoder", temporary / "autoencoder")
            shift, scale = _shift_and_scale(codec.model)
            index["codec"] = ["diffusers", type(codec.model).__name__]
            index["decoder"] = {"shift": shift.flatten().tolist(), "scale": scale.flatten().tolist()}
        shutil.rmtree(temporary / "codec")
        if isinstance(codec, AutoencoderCodec):
            shutil.move(temporary / "autoencoder", temporary / "codec")
        write_json(temporary / INDEX, index)
        (temporary / "pipeline.py").write_text(_generate(pipeline, adapter), encoding="utf-8")


def _check_exportable(pipeline: Any) -> Adapter:
    experts, codec = pipeline.experts, pipeline.to_ensemble_pipeline().codec
    networks = {type(network).__name__ for expert in experts.values() for network in expert.networks()}
    name = next(iter(networks), "")
    kinds = {(getattr(expert, "prediction", ""), expert.few_step) for expert in experts.values()}
    reason = (
        "its experts are loaded by need"
        if pipeline.pager is not None
        else f"its experts are of the classes {', '.join(sorted(networks))}"
        if len(networks) > 1
        else f"{name} is no class of diffusers"
        if ADAPTERS[name].module.startswith("experts.")
        else "its networks have layers of this package"
        if any(quantized_modules(network) for expert in experts.values() for network in expert.networks())
        else "its experts predict no velocity, or have a few-step schedule"
        if kinds != {("velocity", None)}
        else "its codec is neither pixels nor an autoencoder of diffusers"
        if not isinstance(codec, PixelCodec) and not (isinstance(codec, AutoencoderCodec) and _is_plain(codec))
        else f"its scheduler is {type(pipeline.scheduler).__name__}"
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
        else ""
    )
    if reason:
        raise PipelineError(
            f"this ensemble cannot be sampled by diffusers alone: {reason}; save it with save_pretrained, which "
            "ddm.DDMPipeline loads"
        )
    return ADAPTERS[name]


def _is_plain(codec: AutoencoderCodec) -> bool:
    return not hasattr(codec.model, "bn") and type(codec.model).__name__ != "AutoencoderRAE"


def _index(pipeline: Any, index: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Return the index with classes of diffusers, and the shares of the experts by class, the last for none."""
    ids, classes = sorted(pipeline.experts), pipeline.num_classes
    conditions = Condition(torch.tensor([*range(classes), -1]))
    prior = pipeline.ensemble._prior_logits(conditions).double().softmax(-1)[:, ids]
    return {
        "_class_name": ["pipeline", "DDMPipeline"],
        "_diffusers_version": index["_diffusers_version"],
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        **{expert_name(k): ["diffusers", adapter.class_name] for k in ids},
        "prior": prior.tolist(),
        "latent_shape": list(pipeline.latent_shape),
    }


def _generate(pipeline: Any, adapter: Adapter) -> str:
    ids = sorted(pipeline.experts)
    names = [expert_name(k) for k in ids]
    module = sys.modules[adapter.arguments.__module__]
    helpers = [position_ids, pixel_sizes, pack_latents, unpack_latents, CallInputs, call_adapted]
    own = [
        value
        for value in vars(module).values()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and value.__name__ != "_data_settings"
    ]
    functions: list[Any] = [*helpers, *own]
    return TEMPLATE.format(
        count=len(ids),
        network=adapter.class_name,
        names=names,
        packed_side=PACKED_SIDE,
        level=INITIAL_LEVEL,
        sources="\n\n".join(inspect.getsource(function) for function in functions),
        packs=adapter.packs,
        is_flat=adapter.is_flat,
        sign=adapter.sign,
        timestep={"1000 t": "1000 * t", "t": "t", "1 - t": "1 - t"}[adapter.time],
        arguments=adapter.arguments.__name__,
        embedding_index=inspect.getsource(Condition.embedding_index),
        parameters=", ".join(f"{name}=None" for name in names),
        registered=", ".join(f"{name}={name}" for name in names),
    )
