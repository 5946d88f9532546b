"""Caches of trained networks: nothing kept changes nothing, what is kept is counted, and every sample keeps its own."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.cacheable_modules import below_branch, cacheable_modules, uniform_compute_steps
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.acceleration.feature_cache import cache_expert, refit_cache
from ensemble.compression.method import StageError
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import DDMPipeline
from ensemble.sampling.sample import sample
from experts.codec import PixelCodec
from experts.compressed.pruning.layers import remove_layers
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.flops import forward_flops
from router.config import SelectionConfig
from tests.ensemble.compression.trained import trained
from tests.oracles import MixtureOfGaussians

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


def with_cache(expert, tmp_path, sampling=SAMPLING, **given):
    return cache_expert({0: expert}, replace(CONFIG, **given), sampling, Workspace.at(tmp_path)).experts[0]


def drawn(expert, seeds=range(6), sampling=SAMPLING):
    return sample(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), CODEC, seeds, sampling)


def far(one, other):
    return float((one.latents - other.latents).norm() / other.latents.norm())


@pytest.mark.parametrize("solver", ["euler", "heun", "flow_match_euler", "flow_match_heun"])
def test_an_interval_of_one_is_bit_exact(expert, solver, tmp_path):
    sampling = replace(SAMPLING, solver=solver)
    ours = drawn(with_cache(expert, tmp_path, sampling, interval=1), sampling=sampling)
    plain = drawn(expert, sampling=sampling)
    assert torch.equal(ours.latents, plain.latents) and ours.calls.full_calls == plain.calls.full_calls


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
def test_what_is_kept_is_not_computed_and_the_count_says_so(expert, level, tmp_path):
    made = with_cache(expert, tmp_path, level=level)
    ours, plain = drawn(made), drawn(expert)
    assert 0 < far(ours, plain) < 1
    work = ours.calls.full_calls["0"] / plain.calls.full_calls["0"]
    assert sum(made.cache.relative_flops) / STEPS == pytest.approx(work) and work < 1
    row = lambda: call_network(expert.model, torch.zeros(1, 1, 8, 8), torch.ones(1), Condition.null(1))  # noqa: E731
    whole = forward_flops(row)
    counted = forward_flops(lambda: drawn(made, [0]))
    assert counted == pytest.approx(whole * STEPS * work, rel=1e-6), "operators that really ran, by another counter"


def test_every_sample_keeps_its_own_whatever_the_batch(expert, tmp_path):
    made = with_cache(expert, tmp_path, order=1)
    together = drawn(made)
    for seed in (0, 3):
        torch.testing.assert_close(drawn(made, [seed]).latents[0], together.latents[seed], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sticky", "sample", "full", "top_k", "sticky_resample"])
def test_samples_that_change_experts_take_no_features_along(dit, name, tmp_path):
    other = replace(dit, cluster_id=1)
    made = cache_expert({0: dit, 1: other}, CONFIG, SAMPLING, Workspace.at(tmp_path)).experts
    router = MixtureOfGaussians((0.5, 0.5)).router()
    router.means = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    class Flat:
        """The exact posterior of two Gaussians, on flattened latents."""

        num_experts, path = 2, RECTIFIED_FLOW

        def logits(self, noised, t, condition):
            return router.logits(noised.flatten(1), t, condition)

        def prior_logits(self, condition, present=None):
            return router.prior_logits(condition, present)

        def to(self, device):
            return self

        def save(self, folder):
            raise NotImplementedError("it lives in memory")

    whole = Ensemble(experts=made, noise_schedule=RECTIFIED_FLOW, router=Flat())
    sampling = replace(SAMPLING, selection=SelectionConfig(name=name))
    batch = sample(whole, CODEC, range(6), sampling)
    for seed in (1, 4):
        alone = sample(whole, CODEC, [seed], sampling)
        torch.testing.assert_close(alone.latents[0], batch.latents[seed], atol=1e-5, rtol=1e-4)
    assert sum(batch.calls.full_calls.values()) < batch.calls.experts.total()


def test_both_branches_of_guidance_have_a_cache_of_their_own(dit, tmp_path):
    guided = replace(SAMPLING, guidance_scale=2.0)
    made = with_cache(dit, tmp_path, interval=1)
    whole = [Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW) for expert in (made, dit)]
    ours, plain = (sample(one, CODEC, range(4), guided, [1, 2, 3, 4]) for one in whole)
    assert torch.equal(ours.latents, plain.latents)
    kept = Ensemble(experts={0: with_cache(dit, tmp_path, interval=2)}, noise_schedule=RECTIFIED_FLOW)
    near = sample(kept, CODEC, range(4), guided, [1, 2, 3, 4])
    single = sample(kept, CODEC, [2], guided, [3])
    torch.testing.assert_close(single.latents[0], near.latents[2], atol=1e-5, rtol=1e-4)


def test_deepcache_keeps_the_inside_of_a_unet_and_nothing_else(unet, tmp_path):
    model = unet.model
    paths = below_branch(model, 0)
    assert {"mid_block", "down_blocks.1", "up_blocks.0", "down_blocks.0.resnets.0"} <= set(paths)
    assert not any(path.startswith("conv_") for path in paths)
    assert "up_blocks.1.resnets.1" not in paths and "up_blocks.1.resnets.0" in paths
    deeper = below_branch(model, 1)
    assert set(deeper) < set(paths) and "down_blocks.0.resnets.0" not in deeper
    made = with_cache(unet, tmp_path, policy="deepcache")
    assert sum(made.cache.relative_flops) < 0.7 * STEPS
    with pytest.raises(StageError, match=r"branches 0 \.\.\. 1"):
        below_branch(model, 5)


def test_deepcache_of_a_transformer_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match="take policy=uniform"):
        with_cache(dit, tmp_path, policy="deepcache")


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
def test_adaptive_schedules_look_at_every_level_of_every_network(expert, level, tmp_path):
    made = with_cache(expert, tmp_path, policy="adaptive", level=level)
    assert all(steps[0] == 0 for steps in made.cache.compute_steps.values()) and 0 < far(drawn(made), drawn(expert)) < 1


@pytest.mark.parametrize("policy", ["adaptive", "unified"])
def test_schedules_that_look_are_functions_of_the_seed_and_start_with_a_whole_step(dit, policy, tmp_path):
    made, again = (with_cache(dit, tmp_path, policy=policy) for _ in range(2))
    assert made.cache == again.cache
    assert all(steps[0] == 0 for steps in made.cache.compute_steps.values())
    counts = [len(steps) for steps in made.cache.compute_steps.values()]
    assert min(counts) == STEPS // 3
    if policy == "unified":
        assert len(set(made.cache.compute_steps.values())) == 1


def test_route_aware_schedules_are_each_experts_own_and_global_ones_are_not(dit, tmp_path):
    other = trained("dit", Workspace.at(tmp_path / "other"), 5)
    config = replace(CONFIG, policy="adaptive", route_aware=True)
    both = {0: dit, 1: other}
    own = cache_expert(both, config, SAMPLING, Workspace.at(tmp_path)).experts
    alike = cache_expert(both, replace(config, route_aware=False), SAMPLING, Workspace.at(tmp_path)).experts
    assert own[0].cache.compute_steps != own[1].cache.compute_steps
    assert alike[0].cache.compute_steps == alike[1].cache.compute_steps


def test_a_cache_that_saves_nothing_and_a_student_are_errors(dit, tmp_path):
    with pytest.raises(StageError, match="keep more of it"):
        with_cache(dit, tmp_path, interval=1.05, sampling=replace(SAMPLING, steps=4))
    student = replace(dit, few_step=FewStepSchedule.uniform(2, "renoise", is_distilled=True))
    with pytest.raises(StageError, match="cache an ensemble that was not distilled"):
        with_cache(student, tmp_path)


def test_other_steps_than_the_plans_are_an_error(dit, tmp_path):
    made = with_cache(dit, tmp_path)
    with pytest.raises(ValueError, match="or make the cache again"):
        drawn(made, sampling=replace(SAMPLING, steps=7))


def test_the_folder_keeps_the_plan(dit, tmp_path):
    made = with_cache(dit, tmp_path / "w", order=2)
    made.save(tmp_path / "small")
    again = Expert.load(tmp_path / "small")
    assert again.cache == made.cache
    assert torch.equal(drawn(again).latents, drawn(made).latents)


def test_what_is_pruned_later_leaves_the_plan(dit, tmp_path):
    made = with_cache(dit, tmp_path)
    pruned = replace(made, model=deepcopy(made.model))
    remove_layers(pruned.model, ["transformer_blocks.1.attn1", "transformer_blocks.1.ff"])
    fitted = refit_cache(pruned, made)
    assert sum(fitted.cache.relative_flops) > 1 and refit_cache(made, dit) is made
    assert set(fitted.cache.compute_steps) == {"transformer_blocks.0.attn1", "transformer_blocks.0.ff"}
    drawn(fitted)
    pipeline = DDMPipeline(ensemble=Ensemble(experts={0: fitted}, noise_schedule=RECTIFIED_FLOW), codec=CODEC)
    assert RowFlops.of(pipeline).networks["0"] > 0


@pytest.mark.parametrize(("centre", "power"), [(None, 1.5), (0.0, 1.5), (0.5, 2.0), (1.0, 3.0)])
def test_steps_are_as_many_as_asked_and_closer_around_the_centre(centre, power):
    config = CacheConfig(interval=5, center=centre, power=power)
    steps = uniform_compute_steps(config, 50)
    assert steps[0] == 0 and list(steps) == sorted(set(steps)) and max(steps) < 50
    assert len(steps) == pytest.approx(10, abs=2)
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    if centre == 0.0:
        assert gaps[0] < gaps[-1]
    if centre == 1.0:
        assert gaps[0] > gaps[-1]


def test_a_network_without_such_modules_is_an_error():
    with pytest.raises(StageError, match="has nothing of level layer"):
        cacheable_modules(torch.nn.Linear(2, 2), CONFIG)
