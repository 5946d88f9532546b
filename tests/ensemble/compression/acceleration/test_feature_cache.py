"""Feature caches of trained networks: exact without reuse, counted savings, independent samples."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from benchmarks.testbed.backbones import SHAPE, TINY, build, inputs
from ddm_core.artifacts import Workspace
from ddm_core.errors import DDMError
from ensemble.compression.acceleration.cacheable_modules import (
    PATTERNS,
    cacheable_modules,
    modules_below_branch,
    uniform_compute_steps,
)
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.acceleration.feature_cache import cache_experts, refit_cache
from ensemble.compression.method import StageError
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.sample import sample
from experts.codec import PixelCodec
from experts.compressed.pruning.layers import remove_layers
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.flops import forward_flops
from router.config import SelectionConfig
from tests.ensemble.compression.trained import trained
from tests.experts.compressed.pruning.test_layers import NETWORKS, network
from tests.oracles import MixtureOfGaussians

OTHERS = {case for case in TINY if case.partition("/")[0] not in PATTERNS} | {"CogView4Transformer2DModel"}
STEPS = 12
SAMPLING = SamplingConfig(solver="euler", steps=STEPS, selection=SelectionConfig(name="full"))
CONFIG = CacheConfig(rows=4)


CODEC = PixelCodec(image_shape=(8, 8, 1))


@pytest.fixture(scope="module", params=["unet", "dit", "mlp"])
def expert(request, tmp_path_factory):
    return trained(request.param, Workspace.at(tmp_path_factory.mktemp(request.param)), 60)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return trained("dit", Workspace.at(tmp_path_factory.mktemp("dit")), 60)


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return trained("unet", Workspace.at(tmp_path_factory.mktemp("unet")), 60)


def with_cache(expert, tmp_path, sampling=SAMPLING, **settings):
    return cache_experts({0: expert}, replace(CONFIG, **settings), sampling, Workspace.at(tmp_path)).experts[0]


def generate(expert, seeds=range(6), sampling=SAMPLING):
    return sample(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), CODEC, seeds, sampling)


def relative_distance(samples, other):
    return float((samples.latents - other.latents).norm() / other.latents.norm())


@pytest.mark.parametrize("solver", ["euler", "heun", "flow_match_euler", "flow_match_heun"])
def test_an_interval_of_one_is_bit_identical(expert, solver, tmp_path):
    sampling = replace(SAMPLING, solver=solver)
    cached_samples = generate(with_cache(expert, tmp_path, sampling, interval=1), sampling=sampling)
    plain = generate(expert, sampling=sampling)
    assert (
        torch.equal(cached_samples.latents, plain.latents) and cached_samples.calls.full_calls == plain.calls.full_calls
    )


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
def test_cached_modules_are_skipped_and_counted(expert, level, tmp_path):
    cached = with_cache(expert, tmp_path, level=level)
    cached_samples, plain = generate(cached), generate(expert)
    assert 0 < relative_distance(cached_samples, plain) < 1
    share = cached_samples.calls.full_calls["0"] / plain.calls.full_calls["0"]
    assert sum(cached.cache.relative_flops) / STEPS == pytest.approx(share) and share < 1
    row = lambda: call_network(expert.model, torch.zeros(1, 1, 8, 8), torch.ones(1), Condition.null(1))  # noqa: E731
    full_step = forward_flops(row)
    counted = forward_flops(lambda: generate(cached, [0]))
    assert counted == pytest.approx(full_step * STEPS * share, rel=1e-6), (
        "FLOPs of executed operators, from another counter"
    )


def test_other_steps_than_those_of_a_cache_are_an_error(expert, tmp_path):
    with pytest.raises(DDMError, match="sample with as many steps of the same solver"):
        generate(with_cache(expert, tmp_path), sampling=replace(SAMPLING, steps=7))


def test_samples_do_not_depend_on_their_batch(expert, tmp_path):
    cached = with_cache(expert, tmp_path, order=1)
    batch = generate(cached)
    for seed in (0, 3):
        torch.testing.assert_close(generate(cached, [seed]).latents[0], batch.latents[seed], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sticky", "sample", "full", "top_k", "sticky_resample"])
def test_samples_that_change_experts_reuse_no_features(dit, name, tmp_path):
    other = replace(dit, cluster_id=1)
    cached = cache_experts({0: dit, 1: other}, CONFIG, SAMPLING, Workspace.at(tmp_path)).experts
    router = MixtureOfGaussians((0.5, 0.5)).router()
    router.means = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    class Flat:
        """Exact posterior of two Gaussians, on flattened latents."""

        num_experts, path = 2, RECTIFIED_FLOW

        def logits(self, noised, t, condition):
            return router.logits(noised.flatten(1), t, condition)

        def prior_logits(self, condition, present=None):
            return router.prior_logits(condition, present)

        def to(self, device):
            return self

        def save(self, folder):
            raise NotImplementedError("in-memory router")

    ensemble = Ensemble(experts=cached, noise_schedule=RECTIFIED_FLOW, router=Flat())
    sampling = replace(SAMPLING, selection=SelectionConfig(name=name))
    batch = sample(ensemble, CODEC, range(6), sampling)
    for seed in (1, 4):
        single = sample(ensemble, CODEC, [seed], sampling)
        torch.testing.assert_close(single.latents[0], batch.latents[seed], atol=1e-5, rtol=1e-4)
    assert sum(batch.calls.full_calls.values()) < batch.calls.experts.total()


def test_both_guidance_branches_have_their_own_cache(dit, tmp_path):
    guided = replace(SAMPLING, guidance_scale=2.0)
    cached = with_cache(dit, tmp_path, interval=1)
    ensembles = [Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW) for expert in (cached, dit)]
    cached_samples, plain = (
        sample(ensemble, CODEC, range(4), guided, Condition(torch.tensor([1, 2, 3, 4]))) for ensemble in ensembles
    )
    assert torch.equal(cached_samples.latents, plain.latents)
    ensemble = Ensemble(experts={0: with_cache(dit, tmp_path, interval=2)}, noise_schedule=RECTIFIED_FLOW)
    batch = sample(ensemble, CODEC, range(4), guided, Condition(torch.tensor([1, 2, 3, 4])))
    single = sample(ensemble, CODEC, [2], guided, Condition(torch.tensor([3])))
    torch.testing.assert_close(single.latents[0], batch.latents[2], atol=1e-5, rtol=1e-4)


def test_deepcache_caches_the_inner_layers_of_a_unet(unet, tmp_path):
    model = unet.model
    paths = modules_below_branch(model, 0)
    assert {"mid_block", "down_blocks.1", "up_blocks.0", "down_blocks.0.resnets.0"} <= set(paths)
    assert not any(path.startswith("conv_") for path in paths)
    assert "up_blocks.1.resnets.1" not in paths and "up_blocks.1.resnets.0" in paths
    deeper = modules_below_branch(model, 1)
    assert set(deeper) < set(paths) and "down_blocks.0.resnets.0" not in deeper
    cached = with_cache(unet, tmp_path, policy="deepcache")
    assert sum(cached.cache.relative_flops) < 0.7 * STEPS
    with pytest.raises(StageError, match=r"branches 0 \.\.\. 1"):
        modules_below_branch(model, 5)


def test_deepcache_of_a_transformer_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match=r"set accelerate\.policy=uniform"):
        with_cache(dit, tmp_path, policy="deepcache")


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
def test_adaptive_schedules_support_every_level_and_network(expert, level, tmp_path):
    cached = with_cache(expert, tmp_path, policy="adaptive", level=level)
    assert (
        all(steps[0] == 0 for steps in cached.cache.compute_steps.values())
        and 0 < relative_distance(generate(cached), generate(expert)) < 1
    )


@pytest.mark.parametrize("policy", ["adaptive", "unified"])
def test_adaptive_schedules_are_deterministic(dit, policy, tmp_path):
    cached, repeated = (with_cache(dit, tmp_path, policy=policy) for _ in range(2))
    assert cached.cache == repeated.cache
    assert all(steps[0] == 0 for steps in cached.cache.compute_steps.values())
    counts = [len(steps) for steps in cached.cache.compute_steps.values()]
    assert min(counts) == STEPS // 3
    if policy == "unified":
        assert len(set(cached.cache.compute_steps.values())) == 1


def test_route_aware_schedules_differ_between_experts(dit, tmp_path):
    other = trained("dit", Workspace.at(tmp_path / "other"), 5)
    config = replace(CONFIG, policy="adaptive", route_aware=True)
    both = {0: dit, 1: other}
    separate = cache_experts(both, config, SAMPLING, Workspace.at(tmp_path)).experts
    common = cache_experts(both, replace(config, route_aware=False), SAMPLING, Workspace.at(tmp_path)).experts
    assert separate[0].cache.compute_steps != separate[1].cache.compute_steps
    assert common[0].cache.compute_steps == common[1].cache.compute_steps


def test_a_useless_cache_or_a_student_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match="must save 1 % of the FLOPs"):
        with_cache(dit, tmp_path, interval=1.05, sampling=replace(SAMPLING, steps=4))
    student = replace(dit, few_step=FewStepSchedule.uniform(2, "renoise", is_distilled=True))
    with pytest.raises(StageError, match="cache an ensemble that was not distilled"):
        with_cache(student, tmp_path)


def test_other_steps_than_the_schedules_are_an_error(dit, tmp_path):
    cached = with_cache(dit, tmp_path)
    with pytest.raises(ValueError, match="or make the cache again"):
        generate(cached, sampling=replace(SAMPLING, steps=7))


def test_a_saved_expert_keeps_its_schedule(dit, tmp_path):
    cached = with_cache(dit, tmp_path / "w", order=2)
    cached.save(tmp_path / "small")
    loaded = Expert.load(tmp_path / "small")
    assert loaded.cache == cached.cache
    assert torch.equal(generate(loaded).latents, generate(cached).latents)


def test_pruned_modules_leave_the_schedule(dit, tmp_path):
    cached = with_cache(dit, tmp_path)
    pruned = replace(cached, model=deepcopy(cached.model))
    remove_layers(pruned.model, ["transformer_blocks.1.attn1", "transformer_blocks.1.ff"])
    adapted = refit_cache(pruned, cached)
    assert sum(adapted.cache.relative_flops) > 1 and refit_cache(cached, dit) is cached
    assert set(adapted.cache.compute_steps) == {"transformer_blocks.0.attn1", "transformer_blocks.0.ff"}
    generate(adapted)
    pipeline = EnsemblePipeline(ensemble=Ensemble(experts={0: adapted}, noise_schedule=RECTIFIED_FLOW), codec=CODEC)
    assert RowFlops.measure(pipeline).networks["0"] > 0


@pytest.mark.parametrize(("center", "power"), [(None, 1.5), (0.0, 1.5), (0.5, 2.0), (1.0, 3.0)])
def test_steps_match_the_interval_and_cluster_at_the_center(center, power):
    config = CacheConfig(interval=5, center=center, power=power)
    steps = uniform_compute_steps(config, 50)
    assert steps[0] == 0 and list(steps) == sorted(set(steps)) and max(steps) < 50
    assert len(steps) == pytest.approx(10, abs=2)
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    if center == 0.0:
        assert gaps[0] < gaps[-1]
    if center == 1.0:
        assert gaps[0] > gaps[-1]


def test_a_network_without_known_modules_is_an_error():
    with pytest.raises(StageError, match="has no modules of level layer"):
        cacheable_modules(torch.nn.Linear(2, 2), CONFIG)


def untrained(config):
    return Expert(
        model=network(config),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=0,
        cluster_id=0,
    )


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
@pytest.mark.parametrize("config", NETWORKS[3:], ids=lambda config: config.class_name)
def test_networks_that_read_text_inherit_features_at_every_level(config, level, tmp_path):
    """Attention of an MMDiT returns images and texts, and its last block no text; blocks of a U-Net return tuples."""
    expert = untrained(config)
    plain = generate(expert)
    assert torch.equal(generate(with_cache(expert, tmp_path, level=level, interval=1)).latents, plain.latents)
    for policy, order in (("uniform", 1), ("adaptive", 0)):
        settings = {"level": level, "interval": 3, "policy": policy, "order": order}
        cached = with_cache(expert, tmp_path / policy, **settings)
        samples = generate(cached)
        assert samples.calls.full_calls["0"] < 0.9 * plain.calls.full_calls["0"]
        assert relative_distance(samples, plain) > 0


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
@pytest.mark.parametrize("case", sorted(OTHERS))
def test_every_other_transformer_inherits_features(case, level, tmp_path):
    expert = Expert(
        model=build(case),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=0,
        cluster_id=0,
    )
    codec = PixelCodec(image_shape=(*SHAPE[1:], SHAPE[0]))
    ensemble = lambda expert: Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW)  # noqa: E731
    draw = lambda expert: sample(ensemble(expert), codec, range(3), SAMPLING)  # noqa: E731
    plain = draw(expert)
    assert torch.equal(draw(with_cache(expert, tmp_path, level=level, interval=1)).latents, plain.latents)
    cached = draw(with_cache(expert, tmp_path / "cached", level=level, interval=3))
    assert cached.calls.full_calls["0"] < 0.95 * plain.calls.full_calls["0"]
    assert relative_distance(cached, plain) > 0
    adaptive = draw(with_cache(expert, tmp_path / "adaptive", level=level, policy="adaptive", order=0))
    assert relative_distance(adaptive, plain) > 0
    count, modules = Counter[str](), cacheable_modules(expert.model, replace(CONFIG, level=level))
    for path in modules:
        expert.model.get_submodule(path).register_forward_hook(lambda *_, path=path: count.update([path]))
    call_network(expert.model, *inputs(case))
    assert count == dict.fromkeys(modules, 1), "an output of two calls has no one value"


def test_deepcache_caches_the_inner_layers_of_a_text_unet(tmp_path):
    expert = untrained(NETWORKS[4])
    paths = modules_below_branch(expert.model, 0)
    assert {"mid_block", "down_blocks.0.attentions.0", "up_blocks.1.attentions.0"} <= set(paths)
    assert "up_blocks.1.attentions.1" not in paths
    plain, cached = generate(expert), with_cache(expert, tmp_path, policy="deepcache")
    assert sum(cached.cache.relative_flops) < 0.7 * STEPS
    assert relative_distance(generate(cached), plain) > 0
    exact = with_cache(expert, tmp_path / "exact", policy="deepcache", interval=1)
    assert torch.equal(generate(exact).latents, plain.latents)
