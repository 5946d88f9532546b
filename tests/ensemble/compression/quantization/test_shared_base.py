"""Experts with a shared base: smaller in total, close to the original, and bit-identical when loaded."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Preempted, Workspace, list_files
from ensemble.compression.config import CompressionConfig
from ensemble.compression.measurement import compare
from ensemble.compression.method import StageError
from ensemble.compression.quantization.config import SharedBaseConfig
from ensemble.compression.quantization.shared_base import share_base
from ensemble.compression.run import open_clusters
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.prompts import Prompts
from experts.codec import PixelCodec
from experts.compressed.quantization.shared_weight import SharedWeight, shared_weights
from experts.conditions.condition import Condition
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


def make_experts(kind="residual_mlp", count=3, spread=0.1, rank=None):
    """Return experts of one initialization; each weight differs by a share of its norm, by a matrix of this rank."""
    torch.manual_seed(0)
    start = build_network(NETWORKS[kind], SHAPE, 2).eval()
    for parameter in start.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    experts = {}
    for k in range(count):
        model = deepcopy(start)
        for weight in model.parameters():
            rows, columns = len(weight), weight[0].numel()
            delta = torch.randn(rows, columns) if rank is None else torch.randn(rows, rank) @ torch.randn(rank, columns)
            weight.data += spread * weight.data.norm() * (delta / delta.norm()).reshape(weight.shape)
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


def velocity(expert):
    generator = torch.Generator().manual_seed(0)
    noised, t = torch.randn(6, *SHAPE, generator=generator), torch.rand(6, generator=generator)
    with torch.no_grad():
        return expert.velocity(noised, t, Condition(torch.tensor([0, 1, -1] * 2)))


def distance(compressed, original):
    return max(
        float((velocity(compressed[k]) - velocity(original[k])).norm() / velocity(original[k]).norm()) for k in original
    )


def bytes_ratio(details):
    return (details["bytes_shared"] + details["bytes_own"]) / details["bytes_before"]


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["low_rank", "packed", "tailors"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_is_smaller_close_and_input_unchanged(kind, difference, workspace):
    experts = make_experts(kind, spread=0.05, rank=1)
    before = {k: {n: v.clone() for n, v in expert.model.state_dict().items()} for k, expert in experts.items()}
    config = SharedBaseConfig(delta=difference, directions=1.0, rank=0.375, group_size=16, min_elements=256)
    result = share_base(experts, config, workspace)
    assert all(torch.equal(v, before[k][n]) for k in experts for n, v in experts[k].model.state_dict().items())
    assert result.modules == 3 * len(result.details["weights"]) > 0
    assert bytes_ratio(result.details) < 0.6
    assert distance(result.experts, experts) < 0.2
    assert all(weight["error"] < 0.5 * weight["distance"] for weight in result.details["weights"].values())


def test_more_bits_are_closer_and_differences_quantize_well(workspace):
    experts, results = make_experts(), {}
    for bits in (2, 3, 4, 8):
        results[bits] = share_base(experts, SharedBaseConfig(bits=bits, min_elements=64), workspace)
    errors = [distance(result.experts, experts) for result in results.values()]
    sizes = [bytes_ratio(result.details) for result in results.values()]
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    distant = make_experts(spread=3.0)
    poor = share_base(distant, SharedBaseConfig(bits=2, min_elements=64), workspace)
    assert errors[0] < 0.3 * distance(poor.experts, distant)


def test_a_low_rank_difference_is_recovered(workspace):
    experts = make_experts(rank=2)
    result = share_base(
        experts, SharedBaseConfig(delta="low_rank", base_bits=16, bits=16, rank=0.1, min_elements=1024), workspace
    )
    assert distance(result.experts, experts) < 0.01


def test_more_rounds_never_raise_the_error(workspace):
    experts = make_experts(spread=0.5)
    errors = []
    for rounds in (1, 2, 5):
        config = SharedBaseConfig(delta="low_rank", base_bits=16, bits=16, rounds=rounds, min_elements=64)
        weights = share_base(experts, config, workspace).details["weights"]
        errors.append([weight["error"] for weight in weights.values()])
    for first, second, fifth in zip(*errors, strict=True):
        assert fifth <= second + 1e-4 and second <= first + 1e-4
    assert sum(errors[2]) < sum(errors[0])


def test_tailors_recover_experts_that_scale_the_shared_weight(workspace):
    experts = make_experts(spread=0.0)
    for k, expert in experts.items():
        for _, weight in expert.model.named_parameters():
            weight.data *= 1 + 0.3 * k
    config = SharedBaseConfig(delta="tailors", directions=1.0, base_bits=16, bits=16, rank=0.01, min_elements=64)
    result = share_base(experts, config, workspace)
    assert all(weight["error"] < 0.01 < weight["distance"] for weight in result.details["weights"].values())


def test_repeated_sharing_is_bit_identical(workspace):
    config = SharedBaseConfig(delta="tailors", min_elements=64)
    first, second = (share_base(make_experts(), config, workspace) for _ in range(2))
    assert first.details == second.details
    assert all(torch.equal(velocity(first.experts[k]), velocity(second.experts[k])) for k in first.experts)


def test_experts_without_common_weights_are_an_error(workspace):
    experts = make_experts()
    with pytest.raises(StageError, match="two experts or more"):
        share_base({0: experts[0]}, SharedBaseConfig(), workspace)
    with pytest.raises(StageError, match=r"lower quantize\.min_elements"):
        share_base(experts, SharedBaseConfig(min_elements=10**6), workspace)
    with pytest.raises(StageError, match="of one architecture"):
        share_base({0: experts[0], 1: make_experts("dit")[1]}, SharedBaseConfig(min_elements=64), workspace)
    packed = share_base(experts, SharedBaseConfig(min_elements=64), workspace)
    with pytest.raises(StageError, match="no other stage has packed"):
        share_base(packed.experts, SharedBaseConfig(min_elements=64), workspace)


def test_a_stop_request_preempts_the_stage(workspace):
    with pytest.raises(Preempted, match="sharing restarts from the first"):
        share_base(make_experts(), SharedBaseConfig(min_elements=64), replace(workspace, stopping=lambda: True))


def make_pipeline(experts):
    torch.manual_seed(7)
    model = build_router(RouterConfig(width=8, depth=1), SHAPE, 3, 2)
    router = Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=torch.ones(3, 3, dtype=torch.float64))
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=router)
    return EnsemblePipeline(ensemble=ensemble, codec=PixelCodec(image_shape=(8, 8, 1)), num_classes=2)


@pytest.mark.parametrize("difference", ["low_rank", "packed", "tailors"])
def test_weights_are_rebuilt_once_for_each_expert(difference, workspace, monkeypatch):
    shared = dict(share_base(make_experts(), SharedBaseConfig(delta=difference, min_elements=64), workspace).experts)
    pipeline, sampling = make_pipeline(shared), SamplingConfig(solver="euler", steps=4, guidance_scale=2)
    prompts, rebuilt = Prompts.of_classes([0, 1] * 8), []
    with torch.enable_grad():
        expected = {k: velocity_with_gradients(expert) for k, expert in shared.items()}
    build = SharedWeight.compute_delta
    monkeypatch.setattr(SharedWeight, "compute_delta", lambda weight: rebuilt.append(id(weight)) or build(weight))
    result = pipeline(range(16), sampling, prompts)
    weights = [weight for expert in shared.values() for _, weight in shared_weights(expert.model)]
    assert len(result.calls.experts) == 3 and sorted(rebuilt) == sorted(map(id, weights))
    kept = {id(weight.base): weight.base.built[1].nbytes for weight in weights}
    assert sum(kept.values()) == sum(4 * torch.Size(weight.config.shape).numel() for weight in weights) / 3
    assert all(torch.equal(velocity(expert), expected[k]) for k, expert in shared.items())


def velocity_with_gradients(expert):
    generator = torch.Generator().manual_seed(0)
    noised, t = torch.randn(6, *SHAPE, generator=generator), torch.rand(6, generator=generator)
    return expert.velocity(noised, t, Condition(torch.tensor([0, 1, -1] * 2))).detach()


@pytest.mark.parametrize("kind", ["residual_mlp", "dit"])
def test_flops_are_those_of_the_rows_that_are_called(kind, workspace, tmp_path):
    """Counted on one row with its weights, an MLP of shared weights seemed to cost a hundred times as much."""
    experts = make_experts(kind)
    pipelines = {"original": make_pipeline(experts)}
    config = SharedBaseConfig(delta="low_rank", min_elements=256)
    pipelines["small"] = make_pipeline(dict(share_base(experts, config, workspace).experts))
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
    costs = [RowFlops.measure(pipeline).experts for pipeline in pipelines.values()]
    assert costs[0] == costs[1]
    compression = CompressionConfig(
        method=config, sampling=SamplingConfig(steps=10), labelled=False, num_samples=64, batch_sizes=(16, 64)
    )
    folders, data = (tmp_path / "original", tmp_path / "small"), open_clusters([], tmp_path, labeled=False)
    report = compare(("shared_base",), 1, folders, data, compression, workspace)
    ratios = [cost.flops_after / cost.flops_before for cost in report.served]
    assert 1 < ratios[1] < ratios[0] < (1.1 if kind == "dit" else 2)


@pytest.mark.parametrize("difference", ["low_rank", "packed", "tailors"])
def test_a_pipeline_stores_the_base_once_and_loads_exactly(difference, workspace, tmp_path):
    experts = make_experts()
    result = share_base(experts, SharedBaseConfig(delta=difference, min_elements=64), workspace)
    sizes = {}
    for name, members in {"original": experts, "small": dict(result.experts)}.items():
        pipeline = make_pipeline(members)
        pipeline.save_pretrained(tmp_path / name)
        sizes[name] = sum(file.stat().st_size for file in list_files(tmp_path / name))
    assert sizes["small"] < 0.6 * sizes["original"]
    loaded = EnsemblePipeline.from_pretrained(tmp_path / "small")
    sampling = SamplingConfig(steps=2, selection=SelectionConfig(name="full"))
    assert torch.equal(loaded(range(4), sampling).latents, pipeline(range(4), sampling).latents)
    linked = [dict(shared_weights(expert.model)) for expert in loaded.ensemble.experts.values()]
    assert linked[0] and all(linked[0][name].base is other[name].base for other in linked for name in other)
    loaded.save_pretrained(tmp_path / "loaded")
    for file in list_files(tmp_path / "loaded"):
        assert file.read_bytes() == (tmp_path / "small" / file.relative_to(tmp_path / "loaded")).read_bytes()
