"""diffusers' hooks: what they keep is counted, a hook that matches nothing is an error, and samples stay apart."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import HookConfig
from ensemble.compression.acceleration.diffusers_hooks import cache_schedule, hook_all
from ensemble.compression.acceleration.feature_cache import refit_cache
from ensemble.compression.config import DynamicInt8Config
from ensemble.compression.method import Clusters, CompressionContext, StageError
from ensemble.compression.quantization.weight_only import quantize_dynamic_int8
from ensemble.config import SamplingConfig
from ensemble.multi_network_experts import TimeSplitExpert
from experts.compressed.caching.diffusers_hooks import CacheHook, apply_cache_hook
from experts.compressed.caching.plan import CacheSchedule
from experts.compressed.pruning.layers import remove_layers
from experts.expert import Expert, network_flops
from tests.ensemble.compression.acceleration.test_feature_cache import SAMPLING, STEPS, drawn, far
from tests.ensemble.compression.trained import trained

TIMES = tuple(1 - index / STEPS for index in range(STEPS))
CONFIG = HookConfig(rows=2)
KINDS = ("taylorseer", "first_block", "mag", "pyramid")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return trained("dit", Workspace.at(tmp_path_factory.mktemp("dit")), 150)


def with_hook(expert, tmp_path, **given):
    plan, flops = cache_schedule(expert, replace(CONFIG, **given), TIMES, Workspace.at(tmp_path))
    assert flops > 0
    return replace(expert, cache=plan)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_saves_something_and_every_sample_is_the_same_alone(kind, dit, tmp_path):
    made = with_hook(dit, tmp_path, hook=kind, threshold=0.3)
    assert sum(made.cache.relative_flops) < 0.9 * STEPS and made.cache.relative_flops[0] == 1
    before = {name: value.clone() for name, value in dit.model.state_dict().items()}
    together = drawn(made, range(4))
    assert 0 < far(together, drawn(dit, range(4))) < 1
    torch.testing.assert_close(drawn(made, [2]).latents[0], together.latents[2], atol=1e-5, rtol=1e-4)
    assert together.calls.full_calls["0"] == pytest.approx(4 * sum(made.cache.relative_flops))
    assert all(torch.equal(value, before[name]) for name, value in dit.model.state_dict().items())
    assert not any(hasattr(module, "_diffusers_hook") for module in dit.model.modules()), "the network is as it was"


def test_planning_costs_what_is_counted_along_it(dit, tmp_path):
    plan, flops = cache_schedule(dit, CONFIG, TIMES, Workspace.at(tmp_path))
    assert flops == pytest.approx(2 * sum(plan.relative_flops) * network_flops(dit.model, dit.latent_shape))
    mag = cache_schedule(dit, replace(CONFIG, hook="mag", threshold=0.3), TIMES, Workspace.at(tmp_path))
    assert mag[1] == pytest.approx(
        2 * (STEPS + sum(mag[0].relative_flops)) * network_flops(dit.model, dit.latent_shape)
    )


def test_a_hook_outlives_few_bits_and_not_fewer_layers(dit, tmp_path):
    made = with_hook(dit, tmp_path)
    small = quantize_dynamic_int8(made, DynamicInt8Config(min_elements=64)).network
    assert refit_cache(small, made).cache == made.cache
    drawn(small)
    pruned = replace(made, model=deepcopy(made.model))
    remove_layers(pruned.model, ["transformer_blocks.1.ff"])
    with pytest.raises(StageError, match="take accelerate=cache"):
        refit_cache(pruned, made)


def test_who_comes_in_the_middle_of_a_trajectory_is_refused(dit, tmp_path):
    made = with_hook(dit, tmp_path)
    scheduled = TimeSplitExpert(networks=(made, dit), bounds=(0.5,))
    with pytest.raises(ValueError, match="called once a step"):
        drawn(scheduled)


def test_an_interval_of_one_changes_nothing(dit, tmp_path):
    made = with_hook(dit, tmp_path, hook="taylorseer", interval=1)
    assert torch.equal(drawn(made).latents, drawn(dit).latents)


def test_taylorseer_is_ours_of_the_same_order_where_both_compute_at_the_same_steps(dit, tmp_path):
    theirs = with_hook(dit, tmp_path, hook="taylorseer", interval=3, order=1)
    steps = tuple(index for index in range(STEPS) if theirs.cache.relative_flops[index] == 1)
    paths = [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in ("attn1", "ff")]
    plan = CacheSchedule(
        times=TIMES, compute_steps=dict.fromkeys(paths, steps), order=1, relative_flops=theirs.cache.relative_flops
    )
    torch.testing.assert_close(drawn(replace(dit, cache=plan)).latents, drawn(theirs).latents, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "hook"),
    [(kind, hook) for kind in ("mlp", "unet") for hook in KINDS if (kind, hook) != ("unet", "pyramid")],
)
def test_a_hook_that_matches_nothing_is_an_error(kind, hook, tmp_path):
    expert = trained(kind, Workspace.at(tmp_path / "t"), 2)
    with pytest.raises(StageError, match="take accelerate=cache"):
        with_hook(expert, tmp_path, hook=hook)


def test_a_solver_that_calls_twice_a_step_is_refused(dit, tmp_path):
    data = Clusters(folders=[], codec=tmp_path, labelled=False)
    sampling, space = SamplingConfig(solver="heun"), Workspace.at(tmp_path)
    given = CompressionContext(ensemble=tmp_path, original=tmp_path, data=data, sampling=sampling, workspace=space)
    with pytest.raises(StageError, match="makes two a step"):
        hook_all(CONFIG, given)
    made = with_hook(dit, tmp_path)
    with pytest.raises(ValueError, match="called once a step"):
        drawn(made, sampling=replace(SAMPLING, solver="heun"))


def test_the_folder_keeps_the_hook(dit, tmp_path):
    made = with_hook(dit, tmp_path, hook="mag", threshold=0.5)
    assert len(made.cache.hook.ratios) == STEPS
    made.save(tmp_path / "small")
    again = Expert.load(tmp_path / "small")
    assert again.cache == made.cache
    assert torch.equal(drawn(again).latents, drawn(made).latents)


def test_an_unknown_hook_is_refused(dit):
    with pytest.raises(ValueError, match="hook 'tea'"):
        CacheHook.parsed({"kind": "tea", "ratios": []})
    assert apply_cache_hook(dit.model, CacheHook(kind="pyramid")) is not dit.model
