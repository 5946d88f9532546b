"""Mixed precision: within the budget, better than equal bits, and more bits where rounding hurts most."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.method import StageError
from ensemble.compression.quantization.config import MixedPrecisionConfig
from ensemble.compression.quantization.mixed_precision import allocate_bits, weight_costs
from experts.compressed.quantization.registry import quantized_modules
from experts.config import DiTConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit

NETWORKS = {
    "residual_mlp": ResidualMLPConfig(width=64, depth=2),
    "unet": UNetConfig(channels=(8, 16), layers_per_block=1),
    "dit": DiTConfig(heads=2, head_width=32, depth=1, patch_size=2),
}
SHAPE = (1, 4, 4)
COUNTS = {0: 40, 1: 160}


def config(**settings):
    return MixedPrecisionConfig(**({"mean_bits": 5.0, "group_size": 16, "min_elements": 256, "rows": 32} | settings))


@pytest.fixture
def workspace(tmp_path):
    return Workspace.at(tmp_path / "work")


@pytest.fixture(scope="module")
def datasets():
    generator = torch.Generator().manual_seed(0)
    datasets = {}
    for k, count in COUNTS.items():
        centers = 2 * torch.randn(2, *SHAPE, generator=generator)
        labels = torch.arange(count) % 2
        clean = centers[labels] + 0.2 * torch.randn(count, *SHAPE, generator=generator)
        datasets[k] = LatentDataset(clean=clean, class_id=labels, cluster_id=torch.full((count,), k))
    return datasets


def make_expert(kind, k):
    torch.manual_seed(k)
    model = build_network(NETWORKS[kind], SHAPE, 2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=2,
        cluster_id=k,
    )


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """Train one expert per cluster."""
    experts = {}
    for k, dataset in datasets.items():
        torch.manual_seed(k)
        model = build_network(NETWORKS["residual_mlp"], SHAPE, 2)
        training = TrainingConfig(steps=300, batch_size=32, lr=3e-3, warmup_steps=20, checkpoint_every=1000)
        workspace = Workspace.at(tmp_path_factory.mktemp(f"trained_{k}"))

        def loss(model, batch):
            return {"loss": expert_loss(model, batch, "velocity", RECTIFIED_FLOW)}

        expert = make_expert("residual_mlp", k)
        experts[k] = replace(expert, model=fit(model, loss, dataset, training, workspace).model)
    return experts


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_stay_within_the_budget_and_inputs_unchanged(kind, datasets, workspace):
    experts = {k: make_expert(kind, k) for k in COUNTS}
    before = {k: deepcopy(expert.model.state_dict()) for k, expert in experts.items()}
    result = allocate_bits(experts, datasets, config(mean_bits=6.5, rows=8, choices=(3, 5, 8)), workspace)
    assert all(torch.equal(v, before[k][n]) for k in experts for n, v in experts[k].model.state_dict().items())
    assert 5.5 < result.details["mean_bits"] <= 6.5
    nbytes = elements = 0
    for k, quantized in result.experts.items():
        for path, settings in quantized_modules(quantized.model).items():
            module = quantized.model.get_submodule(path)
            nbytes += module.codes.nbytes + module.scales.nbytes
            elements += torch.Size(settings["shape"]).numel()
            assert (
                settings["bits"] == result.details["bits"][k][path.replace(".parametrizations", "").removesuffix(".0")]
            )
    assert result.details["mean_bits"] == pytest.approx(8 * nbytes / elements)
    assert result.modules == sum(len(bits) for bits in result.details["bits"].values()) > 0 and result.flops > 0


@pytest.mark.parametrize("bits", [3, 4])
def test_mixed_bits_have_lower_error_than_equal_bits(bits, trained, datasets, tmp_path):
    equal = allocate_bits(trained, datasets, config(mean_bits=16, choices=(bits,)), Workspace.at(tmp_path / "equal"))
    budget = equal.details["mean_bits"] + 1e-6
    mixed = allocate_bits(trained, datasets, config(mean_bits=budget), Workspace.at(tmp_path / "mixed"))
    assert mixed.details["mean_bits"] <= budget
    assert mixed.details["cost"] < 0.9 * equal.details["cost"]
    assert mixed.details["cost"] == pytest.approx(mixed.details["summed_cost"], rel=0.5)


def test_a_smaller_budget_has_a_higher_error(trained, datasets, workspace):
    costs = [
        allocate_bits(trained, datasets, config(mean_bits=mean), workspace).details["cost"] for mean in (3.5, 4.5, 6)
    ]
    assert costs == sorted(costs, reverse=True)


def test_the_expert_of_the_larger_cluster_gets_more_bits(trained, datasets, workspace):
    twins = {0: trained[1], 1: replace(trained[1], cluster_id=1)}
    sizes = {0: datasets[1], 1: datasets[1]}
    sizes[0] = LatentDataset(**{name: getattr(datasets[1], name)[:16] for name in ("clean", "class_id", "cluster_id")})
    bits = allocate_bits(twins, sizes, config(mean_bits=4.5), workspace).details["bits"]
    assert sum(bits[0].values()) < sum(bits[1].values())


def test_costs_fall_with_bits_and_the_model_is_restored(trained, datasets, workspace):
    costs_by_name = weight_costs(trained[0], datasets[0], config(choices=(2, 4, 8)), workspace)
    assert all(costs[0] > costs[1] > costs[2] > 0 for costs in costs_by_name.values())
    assert weight_costs(trained[0], datasets[0], config(choices=(2, 4, 8)), workspace) == costs_by_name


def test_a_restarted_stage_reuses_measured_experts(trained, datasets, tmp_path):
    uninterrupted = allocate_bits(trained, datasets, config(), Workspace.at(tmp_path / "uninterrupted"))
    workspace, polls = Workspace.at(tmp_path / "interrupted"), []

    def stopping():
        polls.append(None)
        return len(polls) > len(uninterrupted.details["costs"][0]) + 1

    with pytest.raises(Preempted, match="finished experts are kept"):
        allocate_bits(trained, datasets, config(), replace(workspace, stopping=stopping))
    assert sorted(path.name for path in workspace.scratch.glob("costs_*.json")) == ["costs_0.json"]
    resumed = allocate_bits(trained, datasets, config(), workspace)
    assert resumed.details == uninterrupted.details


def test_a_budget_or_size_without_solution_is_an_error(trained, datasets, workspace):
    with pytest.raises(StageError, match=r"at least 3\.\d+ with these choices.*is 2.*raise quantize\.mean_bits"):
        allocate_bits(trained, datasets, config(mean_bits=2.0), workspace)
    with pytest.raises(StageError, match=r"a matrix of at least 1000000 elements.*lower quantize\.min_elements"):
        weight_costs(trained[0], datasets[0], config(min_elements=10**6), workspace)
