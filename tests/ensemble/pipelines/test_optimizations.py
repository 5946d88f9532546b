"""Caches, compiled blocks and quantization of diffusers on named experts, and clear words where a class cannot."""

import sys

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.quantizers import PipelineQuantizationConfig

from benchmarks.arms.diffusers_pipelines import build_ensemble
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.components import owner_of
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from experts.conditions.condition import Condition
from router.config import SelectionConfig

SEEDS = range(6)
SETTINGS = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "latent"}
CONFIGS = {
    "taylorseer": TaylorSeerCacheConfig(cache_interval=3, max_order=1),
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "faster": FasterCacheConfig(spatial_attention_block_skip_range=3),
    "pyramid": PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3),
}


def rows_of(text, count):
    return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in text.items()}


def sample(pipe, text, seeds=SEEDS, **settings):
    negative = {f"negative_{name}": 0.5 * value for name, value in text.items() if "mask" not in name}
    if "prompt_attention_mask" in text:
        negative["negative_prompt_attention_mask"] = text["prompt_attention_mask"]
    return pipe(seeds=seeds, **rows_of(text | negative, len(seeds)), **SETTINGS | settings).images


@pytest.mark.parametrize(
    ("name", "cache"),
    [("PixArtTransformer2DModel", cache) for cache in CONFIGS]
    + [("SD3Transformer2DModel", cache) for cache in CONFIGS if cache != "first block"],
)
def test_cache_changes_its_experts_only_and_seeds_stay_alone(name, cache):
    pipe, text = build_ensemble(name, 3)
    plain = sample(pipe, text)
    gates = pipe.ensemble.init_routing(
        SEEDS, Condition.null(len(SEEDS)), SelectionConfig(name="sticky")
    ).state.gates.argmax(1)
    pipe.enable_cache(CONFIGS[cache], experts=[1, 2])
    cached = sample(pipe, text)
    changed = (cached != plain).flatten(1).any(1)
    assert torch.equal(changed, gates != 0)
    assert 0 < (gates != 0).sum() < len(SEEDS)
    assert ((cached - plain).norm() / plain.norm()) < 0.5
    torch.testing.assert_close(sample(pipe, text, [3])[0], cached[3], atol=1e-5, rtol=1e-4)
    pipe.disable_cache()
    assert torch.equal(sample(pipe, text), plain)


def test_caches_that_cannot_work_are_refused(pipe, folder):
    with pytest.raises(PipelineError, match="must be one of TaylorSeerCacheConfig"):
        pipe.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4))
    with pytest.raises(PipelineError, match="no expert 9"):
        pipe.enable_cache(CONFIGS["faster"], experts=[9])
    with pytest.raises(PipelineError, match="two transformer blocks"):
        pipe.enable_cache(CONFIGS["first block"])
    sd3, _ = build_ensemble("SD3Transformer2DModel", 1)
    with pytest.raises(PipelineError, match="expert 0, a SD3Transformer2DModel, cannot use FirstBlockCacheConfig"):
        sd3.enable_cache(CONFIGS["first block"])
    pipe.enable_cache(CONFIGS["taylorseer"])
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(PipelineError, match="several calls a step"):
        pipe(seeds=[0], num_inference_steps=4)
    paged = EnsembleDiffusionPipeline.from_pretrained(folder, max_memory=2 * 10**4)
    with pytest.raises(PipelineError, match="loaded by need"):
        paged.enable_cache(CONFIGS["taylorseer"])


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PixArtTransformer2DModel"])
def test_repeated_blocks_are_compiled(name):
    pipe, text = build_ensemble(name, 2)
    plain = sample(pipe, text)
    pipe.compile_repeated_blocks(experts=[0], backend="eager")
    blocks = pipe.expert_0.transformer_blocks[0], pipe.expert_1.transformer_blocks[0]
    assert [block._compiled_call_impl is not None for block in blocks] == [True, False]
    torch.testing.assert_close(sample(pipe, text), plain, atol=1e-5, rtol=1e-4)


def test_network_without_blocks_is_not_compiled(pipe):
    owner_of(pipe.expert_1).model.transformer_blocks = torch.nn.Identity()
    with pytest.raises(PipelineError, match="expert 1, a DiTTransformer2DModel, has no list of blocks"):
        pipe.compile_repeated_blocks()
    assert pipe.expert_0.transformer_blocks[0]._compiled_call_impl is None


def quantized(library, names):
    if library == "quanto":
        pytest.importorskip("optimum.quanto")
        from diffusers import QuantoConfig as Config

        config = Config(weights_dtype="int8")
    else:
        pytest.importorskip("torchao")
        from diffusers import TorchAoConfig as Config
        from torchao.quantization import Int8WeightOnlyConfig

        config = Config(Int8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config))


@pytest.mark.parametrize("library", ["quanto", "torchao"])
def test_named_experts_are_quantized(library, tmp_path):
    config = quantized(library, ["expert_0", "expert_2"])
    pipe, text = build_ensemble("SD3Transformer2DModel", 3)
    pipe.save_pretrained(tmp_path / "folder")
    small = EnsembleDiffusionPipeline.from_pretrained(tmp_path / "folder", quantization_config=config)
    small.set_progress_bar_config(disable=True)
    kinds = [type(getattr(small, f"expert_{k}").transformer_blocks[0].attn.to_q.weight) for k in range(3)]
    assert [kind is torch.nn.Parameter for kind in kinds] == [False, True, False]
    plain = sample(pipe, text)
    assert 0 < (sample(small, text) - plain).norm() / plain.norm() < 0.05
    with pytest.raises(PipelineError, match=r"was quantized when it was loaded.*ddm compress"):
        small.save_pretrained(tmp_path / "again")
    with pytest.raises(PipelineError, match="loaded by need are not quantized"):
        EnsembleDiffusionPipeline.from_pretrained(tmp_path / "folder", quantization_config=config, max_memory=2 * 10**6)


def test_quantization_that_cannot_work_is_refused(folder, monkeypatch):
    class Config:
        quant_mapping = {"router": None}

    with pytest.raises(PipelineError, match="'router' is no expert; those that can be quantized are expert_0"):
        EnsembleDiffusionPipeline.from_pretrained(folder, quantization_config=Config())
    from diffusers import BitsAndBytesConfig

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = PipelineQuantizationConfig(quant_mapping={"expert_0": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(PipelineError, match="expert_0, a DiTTransformer2DModel, was not quantized"):
        EnsembleDiffusionPipeline.from_pretrained(folder, quantization_config=config)
