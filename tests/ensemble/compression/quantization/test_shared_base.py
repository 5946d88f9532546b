"""Experts that share weights: smaller together, near what they were, and one folder that loads bit for bit."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Preempted, Workspace, files_in
from ensemble.compression.method import StageError
from ensemble.compression.quantization.config import SharedBaseConfig
from ensemble.compression.quantization.shared_base import share_base
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipeline import DDMPipeline
from experts.codec import PixelCodec
from experts.compressed.quantization.shared_weight import shared_weights
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from router.config import RouterConfig, SelectionConfig
from router.models.registry import build_router
from router.router import Router

NETWORKS = {
    "residual_mlp": ResidualMLPConfig(width=64, depth=2),
    "unet": UNetConfig(channels=(8, 16), layers_per_block=1),
    "dit": DiTConfig(heads=2, head_width=16, depth=1, patch_size=2),
}
SHAPE = (1, 8, 8)


def make_experts(kind="residual_mlp", count=3, apart=0.1, rank=None):
    """Experts of one start; each weight has gone its own way by a share of its length, in a matrix of this rank."""
    torch.manual_seed(0)
    start = build_network(NETWORKS[kind], SHAPE, 2).eval()
    for parameter in start.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    experts = {}
    for k in range(count):
        model = deepcopy(start)
        for weight in model.parameters():
            rows, columns = len(weight), weight[0].numel()
            own = torch.randn(rows, columns) if rank is None else torch.randn(rows, rank) @ torch.randn(rank, columns)
            weight.data += apart * weight.data.norm() * (own / own.norm()).reshape(weight.shape)
        experts[k] = Expert(
            model=model,
            prediction="velocity",
            noise_schedule=RECTIFIED_FLOW,
            latent_shape=SHAPE,
            num_classes=2,
            cluster_id=k,
        )
    return experts


@pytest.fixture
def workspace(tmp_path):
    return Workspace.at(tmp_path / "work")


def said(expert):
    generator = torch.Generator().manual_seed(0)
    noised, t = torch.randn(6, *SHAPE, generator=generator), torch.rand(6, generator=generator)
    with torch.no_grad():
        return expert.velocity(noised, t, Condition(torch.tensor([0, 1, -1] * 2)))


def distance(made, whole):
    return max(float((said(made[k]) - said(whole[k])).norm() / said(whole[k]).norm()) for k in whole)


def stored(details):
    return (details["bytes_shared"] + details["bytes_own"]) / details["bytes_before"]


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["low_rank", "packed", "tailors"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_is_smaller_and_near_and_the_given_one_is_not_touched(kind, difference, workspace):
    experts = make_experts(kind, apart=0.05, rank=1)
    before = {k: {n: v.clone() for n, v in expert.model.state_dict().items()} for k, expert in experts.items()}
    config = SharedBaseConfig(delta=difference, directions=1.0, rank=0.375, group_size=16, min_elements=256)
    done = share_base(experts, config, workspace)
    assert all(torch.equal(v, before[k][n]) for k in experts for n, v in experts[k].model.state_dict().items())
    assert done.modules == 3 * len(done.details["weights"]) > 0
    assert stored(done.details) < 0.6
    assert distance(done.experts, experts) < 0.2
    assert all(found["error"] < 0.5 * found["distance"] for found in done.details["weights"].values())


def test_more_bits_are_nearer_and_the_difference_is_easier_to_store_than_the_weight(workspace):
    experts, found = make_experts(), {}
    for bits in (2, 3, 4, 8):
        found[bits] = share_base(experts, SharedBaseConfig(bits=bits, min_elements=64), workspace)
    errors = [distance(done.experts, experts) for done in found.values()]
    sizes = [stored(done.details) for done in found.values()]
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    apart = make_experts(apart=3.0)
    far = share_base(apart, SharedBaseConfig(bits=2, min_elements=64), workspace)
    assert errors[0] < 0.3 * distance(far.experts, apart)


def test_a_difference_of_low_rank_is_found(workspace):
    experts = make_experts(rank=2)
    done = share_base(
        experts, SharedBaseConfig(delta="low_rank", base_bits=16, bits=16, rank=0.1, min_elements=1024), workspace
    )
    assert distance(done.experts, experts) < 0.01


def test_fitting_base_and_differences_to_each_other_is_never_worse(workspace):
    experts = make_experts(apart=0.5)
    errors = []
    for rounds in (1, 2, 5):
        config = SharedBaseConfig(delta="low_rank", base_bits=16, bits=16, rounds=rounds, min_elements=64)
        weights = share_base(experts, config, workspace).details["weights"]
        errors.append([found["error"] for found in weights.values()])
    for once, twice, often in zip(*errors, strict=True):
        assert often <= twice + 1e-4 and twice <= once + 1e-4
    assert sum(errors[2]) < sum(errors[0])


def test_own_coefficients_follow_an_expert_that_scales_what_all_share(workspace):
    experts = make_experts(apart=0.0)
    for k, expert in experts.items():
        for _, weight in expert.model.named_parameters():
            weight.data *= 1 + 0.3 * k
    config = SharedBaseConfig(delta="tailors", directions=1.0, base_bits=16, bits=16, rank=0.01, min_elements=64)
    done = share_base(experts, config, workspace)
    assert all(found["error"] < 0.01 < found["distance"] for found in done.details["weights"].values())


def test_the_same_again_is_the_same_to_the_bit(workspace):
    config = SharedBaseConfig(delta="tailors", min_elements=64)
    first, second = (share_base(make_experts(), config, workspace) for _ in range(2))
    assert first.details == second.details
    assert all(torch.equal(said(first.experts[k]), said(second.experts[k])) for k in first.experts)


def test_without_anything_in_common_it_is_an_error(workspace):
    experts = make_experts()
    with pytest.raises(StageError, match="two experts or more"):
        share_base({0: experts[0]}, SharedBaseConfig(), workspace)
    with pytest.raises(StageError, match=r"lower share\.least"):
        share_base(experts, SharedBaseConfig(min_elements=10**6), workspace)
    with pytest.raises(StageError, match="of one architecture"):
        share_base({0: experts[0], 1: make_experts("dit")[1]}, SharedBaseConfig(min_elements=64), workspace)
    once = share_base(experts, SharedBaseConfig(min_elements=64), workspace)
    with pytest.raises(StageError, match="no other stage has packed"):
        share_base(once.experts, SharedBaseConfig(min_elements=64), workspace)


def test_asked_to_stop_it_stops(workspace):
    with pytest.raises(Preempted, match="sharing begins again"):
        share_base(make_experts(), SharedBaseConfig(min_elements=64), replace(workspace, stopping=lambda: True))


@pytest.mark.parametrize("difference", ["low_rank", "packed", "tailors"])
def test_a_pipeline_holds_what_is_shared_once_and_samples_the_same_again(difference, workspace, tmp_path):
    experts = make_experts()
    done = share_base(experts, SharedBaseConfig(delta=difference, min_elements=64), workspace)
    torch.manual_seed(7)
    model = build_router(RouterConfig(width=8, depth=1), SHAPE, 3, 2)
    router = Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=torch.ones(3, 3, dtype=torch.float64))
    sizes = {}
    for name, chosen in {"whole": experts, "small": dict(done.experts)}.items():
        ensemble = Ensemble(experts=chosen, noise_schedule=RECTIFIED_FLOW, router=router)
        pipeline = DDMPipeline(ensemble=ensemble, codec=PixelCodec(image_shape=(8, 8, 1)), num_classes=2)
        pipeline.save_pretrained(tmp_path / name)
        sizes[name] = sum(file.stat().st_size for file in files_in(tmp_path / name))
    assert sizes["small"] < 0.6 * sizes["whole"]
    again = DDMPipeline.from_pretrained(tmp_path / "small")
    sampling = SamplingConfig(steps=2, selection=SelectionConfig(name="full"))
    assert torch.equal(again(range(4), sampling).latents, pipeline(range(4), sampling).latents)
    linked = [dict(shared_weights(expert.model)) for expert in again.ensemble.experts.values()]
    assert linked[0] and all(linked[0][name].base is other[name].base for other in linked for name in other)
    again.save_pretrained(tmp_path / "again")
    for file in files_in(tmp_path / "again"):
        assert file.read_bytes() == (tmp_path / "small" / file.relative_to(tmp_path / "again")).read_bytes()
