"""Bits by sensitivity: within the budget, better than the same bits everywhere, and where it matters most."""

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


def config(**given):
    return MixedPrecisionConfig(**({"mean_bits": 5.0, "group_size": 16, "min_elements": 256, "rows": 32} | given))


@pytest.fixture
def workspace(tmp_path):
    return Workspace.at(tmp_path / "work")


@pytest.fixture(scope="module")
def datasets():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for k, count in COUNTS.items():
        centres = 2 * torch.randn(2, *SHAPE, generator=generator)
        labels = torch.arange(count) % 2
        clean = centres[labels] + 0.2 * torch.randn(count, *SHAPE, generator=generator)
        found[k] = LatentDataset(clean=clean, class_id=labels, cluster_id=torch.full((count,), k))
    return found


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
    """Two experts that know their clusters."""
    experts = {}
    for k, dataset in datasets.items():
        torch.manual_seed(k)
        model = build_network(NETWORKS["residual_mlp"], SHAPE, 2)
        training = TrainingConfig(steps=300, batch_size=32, lr=3e-3, warmup_steps=20, checkpoint_every=1000)
        space = Workspace.at(tmp_path_factory.mktemp(f"trained_{k}"))

        def loss(model, batch):
            return {"loss": expert_loss(model, batch, "velocity", RECTIFIED_FLOW)}

        made = make_expert("residual_mlp", k)
        experts[k] = replace(made, model=fit(model, loss, dataset, training, space).model)
    return experts


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_keeps_to_the_budget_and_the_given_one_is_not_touched(kind, datasets, workspace):
    experts = {k: make_expert(kind, k) for k in COUNTS}
    before = {k: deepcopy(expert.model.state_dict()) for k, expert in experts.items()}
    done = allocate_bits(experts, datasets, config(mean_bits=6.5, rows=8, choices=(3, 5, 8)), workspace)
    assert all(torch.equal(v, before[k][n]) for k in experts for n, v in experts[k].model.state_dict().items())
    assert 5.5 < done.details["mean_bits"] <= 6.5
    spent = entries = 0
    for k, made in done.experts.items():
        for path, found in quantized_modules(made.model).items():
            form = made.model.get_submodule(path)
            spent += form.codes.nbytes + form.scales.nbytes
            entries += torch.Size(found["shape"]).numel()
            assert found["bits"] == done.details["bits"][k][path.replace(".parametrizations", "").removesuffix(".0")]
    assert done.details["mean_bits"] == pytest.approx(8 * spent / entries)
    assert done.modules == sum(len(bits) for bits in done.details["bits"].values()) > 0 and done.flops > 0


@pytest.mark.parametrize("bits", [3, 4])
def test_at_the_same_bytes_it_is_better_than_the_same_bits_everywhere(bits, trained, datasets, tmp_path):
    alike = allocate_bits(trained, datasets, config(mean_bits=16, choices=(bits,)), Workspace.at(tmp_path / "alike"))
    budget = alike.details["mean_bits"] + 1e-6
    found = allocate_bits(trained, datasets, config(mean_bits=budget), Workspace.at(tmp_path / "own"))
    assert found.details["mean_bits"] <= budget
    assert found.details["cost"] < 0.9 * alike.details["cost"]
    assert found.details["cost"] == pytest.approx(found.details["summed_cost"], rel=0.5)


def test_a_smaller_budget_costs_more(trained, datasets, workspace):
    costs = [
        allocate_bits(trained, datasets, config(mean_bits=mean), workspace).details["cost"] for mean in (3.5, 4.5, 6)
    ]
    assert costs == sorted(costs, reverse=True)


def test_the_expert_of_the_larger_cluster_gets_more_bits(trained, datasets, workspace):
    twins = {0: trained[1], 1: replace(trained[1], cluster_id=1)}
    own = {0: datasets[1], 1: datasets[1]}
    own[0] = LatentDataset(**{name: getattr(datasets[1], name)[:16] for name in ("clean", "class_id", "cluster_id")})
    bits = allocate_bits(twins, own, config(mean_bits=4.5), workspace).details["bits"]
    assert sum(bits[0].values()) < sum(bits[1].values())


def test_one_weight_is_measured_at_a_time_and_put_back(trained, datasets, workspace):
    found = weight_costs(trained[0], datasets[0], config(choices=(2, 4, 8)), workspace)
    assert all(costs[0] > costs[1] > costs[2] > 0 for costs in found.values())
    assert weight_costs(trained[0], datasets[0], config(choices=(2, 4, 8)), workspace) == found


def test_what_was_measured_is_kept_and_the_rest_is_measured_after_an_interruption(trained, datasets, tmp_path):
    whole = allocate_bits(trained, datasets, config(), Workspace.at(tmp_path / "whole"))
    space, asked = Workspace.at(tmp_path / "interrupted"), []

    def stopping():
        asked.append(None)
        return len(asked) > len(whole.details["costs"][0]) + 1

    with pytest.raises(Preempted, match="finished experts are kept"):
        allocate_bits(trained, datasets, config(), replace(space, stopping=stopping))
    assert sorted(path.name for path in space.scratch.glob("costs_*.json")) == ["costs_0.json"]
    again = allocate_bits(trained, datasets, config(), space)
    assert again.details == whole.details


def test_what_cannot_be_is_an_error(trained, datasets, workspace):
    with pytest.raises(StageError, match=r"at least 3\.\d+ bits an entry.*raise bits\.mean_bits of 2"):
        allocate_bits(trained, datasets, config(mean_bits=2.0), workspace)
    with pytest.raises(StageError, match=r"no matrix of at least 1000000 entries.*lower bits\.least"):
        weight_costs(trained[0], datasets[0], config(min_elements=10**6), workspace)
