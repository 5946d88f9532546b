"""diffusers' hooks: counted savings, independent samples, and errors for unsupported networks."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ddm_core.json_values import from_json
from ensemble.compression.acceleration.config import HookConfig
from ensemble.compression.acceleration.diffusers_hooks import calibrate_hook, hook_all
from ensemble.compression.acceleration.feature_cache import refit_cache
from ensemble.compression.config import DynamicInt8Config
from ensemble.compression.method import Clusters, CompressionContext, StageError
from ensemble.compression.quantization.weight_only import quantize_dynamic_int8
from ensemble.config import SamplingConfig
from experts.compressed.caching.diffusers_hooks import CacheHook, apply_cache_hook
from experts.compressed.caching.plan import CacheSchedule
from experts.compressed.pruning.layers import remove_layers
from experts.expert import Expert, network_flops
from experts.time_split import TimeSplitExpert
from tests.ensemble.compression.acceleration.test_feature_cache import SAMPLING, STEPS, generate, relative_distance
from tests.ensemble.compression.trained import trained

TIMES = tuple(1 - index / STEPS for index in range(STEPS))
CONFIG = HookConfig(rows=2)
KINDS = ("taylorseer", "first_block", "mag", "pyramid", "faster")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return trained("dit", Workspace.at(tmp_path_factory.mktemp("dit")), 150)


def with_hook(expert, tmp_path, **settings):
    schedule, flops = calibrate_hook(expert, replace(CONFIG, **settings), TIMES, Workspace.at(tmp_path))
    assert flops > 0
    return replace(expert, cache=schedule)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_saves_flops_and_samples_stay_independent(kind, dit, tmp_path):
    cached = with_hook(dit, tmp_path, hook=kind, threshold=0.3)
    assert sum(cached.cache.relative_flops) < 0.9 * STEPS and cached.cache.relative_flops[0] == 1
    before = {name: value.clone() for name, value in dit.model.state_dict().items()}
    batch = generate(cached, range(4))
    assert 0 < relative_distance(batch, generate(dit, range(4))) < 1
    torch.testing.assert_close(generate(cached, [2]).latents[0], batch.latents[2], atol=1e-5, rtol=1e-4)
    assert batch.calls.full_calls["0"] == pytest.approx(4 * sum(cached.cache.relative_flops))
    assert all(torch.equal(value, before[name]) for name, value in dit.model.state_dict().items())
    assert not any(hasattr(module, "_diffusers_hook") for module in dit.model.modules()), (
        "the original network is unchanged"
    )


def test_calibration_flops_equal_the_counted_flops(dit, tmp_path):
    schedule, flops = calibrate_hook(dit, CONFIG, TIMES, Workspace.at(tmp_path))
    assert flops == pytest.approx(2 * sum(schedule.relative_flops) * network_flops(dit.model, dit.latent_shape))
    mag = calibrate_hook(dit, replace(CONFIG, hook="mag", threshold=0.3), TIMES, Workspace.at(tmp_path))
    assert mag[1] == pytest.approx(
        2 * (STEPS + sum(mag[0].relative_flops)) * network_flops(dit.model, dit.latent_shape)
    )


def test_a_hook_survives_quantization_but_not_pruning(dit, tmp_path):
    cached = with_hook(dit, tmp_path)
    small = quantize_dynamic_int8(cached, DynamicInt8Config(min_elements=64)).network
    assert refit_cache(small, cached).cache == cached.cache
    generate(small)
    pruned = replace(cached, model=deepcopy(cached.model))
    remove_layers(pruned.model, ["transformer_blocks.1.ff"])
    with pytest.raises(StageError, match="set accelerate=cache"):
        refit_cache(pruned, cached)


def test_a_hook_from_mid_trajectory_is_an_error(dit, tmp_path):
    cached = with_hook(dit, tmp_path)
    time_split = TimeSplitExpert(experts=(cached, dit), bounds=(0.5,))
    with pytest.raises(ValueError, match="called once a step"):
        generate(time_split)


def test_an_interval_of_one_changes_nothing(dit, tmp_path):
    cached = with_hook(dit, tmp_path, hook="taylorseer", interval=1)
    assert torch.equal(generate(cached).latents, generate(dit).latents)


def test_taylorseer_equals_our_cache_of_the_same_steps(dit, tmp_path):
    hooked = with_hook(dit, tmp_path, hook="taylorseer", interval=3, order=1)
    steps = tuple(index for index in range(STEPS) if hooked.cache.relative_flops[index] == 1)
    paths = [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in ("attn1", "ff")]
    schedule = CacheSchedule(
        times=TIMES, compute_steps=dict.fromkeys(paths, steps), order=1, relative_flops=hooked.cache.relative_flops
    )
    torch.testing.assert_close(
        generate(replace(dit, cache=schedule)).latents, generate(hooked).latents, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("kind", "hook"),
    [(kind, hook) for kind in ("mlp", "unet") for hook in KINDS if (kind, hook) != ("unet", "pyramid")],
)
def test_an_unsupported_network_is_an_error(kind, hook, tmp_path):
    expert = trained(kind, Workspace.at(tmp_path / "t"), 2)
    with pytest.raises(StageError, match="set accelerate=cache"):
        with_hook(expert, tmp_path, hook=hook)


def test_a_solver_with_two_calls_per_step_is_an_error(dit, tmp_path):
    data = Clusters(folders=[], codec=tmp_path, labeled=False)
    sampling, workspace = SamplingConfig(solver="heun"), Workspace.at(tmp_path)
    context = CompressionContext(
        ensemble=tmp_path, original=tmp_path, data=data, sampling=sampling, workspace=workspace
    )
    with pytest.raises(StageError, match="makes two calls per step"):
        hook_all(CONFIG, context)
    cached = with_hook(dit, tmp_path)
    with pytest.raises(ValueError, match="called once a step"):
        generate(cached, sampling=replace(SAMPLING, solver="heun"))


def test_a_saved_expert_keeps_its_hook(dit, tmp_path):
    cached = with_hook(dit, tmp_path, hook="mag", threshold=0.5)
    assert len(cached.cache.hook.ratios) == STEPS
    cached.save(tmp_path / "small")
    loaded = Expert.load(tmp_path / "small")
    assert loaded.cache == cached.cache
    assert torch.equal(generate(loaded).latents, generate(cached).latents)


def test_an_unknown_hook_is_an_error(dit):
    with pytest.raises(ValueError, match="CacheHook.kind: .*got 'tea'"):
        from_json(CacheHook, {"kind": "tea", "ratios": []})
    assert apply_cache_hook(dit.model, CacheHook(kind="pyramid")) is not dit.model
