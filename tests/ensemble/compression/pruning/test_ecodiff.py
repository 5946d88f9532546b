"""Masks learned through whole trajectories: exact gradients at constant memory, and better than chance."""

import copy
import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.method import StageError
from ensemble.compression.pruning.config import EcoDiffConfig
from ensemble.compression.pruning.ecodiff import BETA, GAMMA, ZETA, Gates, hard_concrete, prune_ecodiff, split
from ensemble.compression.pruning.importance import magnitude_importance, random_importance, select_units
from ensemble.compression.pruning.masked_sampling import sample_with_masks
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, unit_counts
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit

SHAPE = (1, 4, 4)
DIT = DiTConfig(patch_size=2, heads=4, head_width=8, depth=2)
NETWORKS = (ResidualMLPConfig(width=16, depth=2), UNetConfig(channels=(8, 16), layers_per_block=1), DIT)
LEARNING = TrainingConfig(steps=40, batch_size=8, lr=0.2, warmup_steps=2, checkpoint_every=5)


def expert_of(config):
    torch.manual_seed(0)
    model = build_network(config, SHAPE, 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=3,
        cluster_id=0,
    )


def latents(count=300):
    """Three patterns, each of its own brightness."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, *SHAPE, generator=generator)
    classes = torch.arange(count) % 3
    brightness = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    clean = patterns[classes] * brightness + 0.1 * torch.randn(count, *SHAPE, generator=generator)
    return LatentDataset(clean=clean, class_id=classes, cluster_id=torch.zeros_like(classes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    expert, training = expert_of(DIT), TrainingConfig(steps=250, batch_size=64, lr=3e-3, warmup_steps=20)
    torch.manual_seed(0)
    model = build_network(DIT, SHAPE, 3)

    def loss(model, batch):
        return {"loss": expert_loss(model, batch, expert.prediction, expert.noise_schedule)}

    fitted = fit(model, loss, latents(), training, Workspace.at(tmp_path_factory.mktemp("trained")))
    return dataclasses.replace(expert, model=fitted.model)


def drawn(rows=6):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, *SHAPE, generator=generator), Condition(torch.arange(rows) % 3)


def test_gates_are_shut_and_open_as_often_as_they_should():
    logits = torch.linspace(-4, 4, 9)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = torch.stack([hard_concrete(logits.double(), row.expand(9)) for row in uniform[:4000]])
    bound = BETA * torch.tensor(-GAMMA / ZETA).log()
    torch.testing.assert_close((gates == 0).double().mean(0), torch.sigmoid(bound - logits).double(), atol=0.03, rtol=0)
    torch.testing.assert_close((gates == 1).double().mean(0), torch.sigmoid(logits + bound).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(gates.mean(0) + gates.mean(0).flip(0), torch.ones(9).double(), atol=0.05, rtol=0)


def test_gates_without_noise_are_functions_of_their_logits():
    gates = Gates(3, 0.0, 0.0)
    assert torch.equal(gates(), torch.full((3,), 0.5)) and torch.equal(gates(), gates())
    assert not torch.equal(Gates(3, 0.0, 0.5)(), gates())


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_gradients_of_a_checkpointed_trajectory_are_the_plain_ones(config):
    expert = expert_of(config)
    counts, (noise, condition), found = prunable_units(expert.model), drawn(), []
    for checkpointed in (False, True):
        masks = torch.linspace(0.2, 1, sum(counts.values())).requires_grad_()
        clean = sample_with_masks(expert, split(masks, counts), noise, condition, 4, checkpointed=checkpointed)
        clean.square().mean().backward()
        found.append((clean.detach(), masks.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-5)
    assert found[0][1].abs().amax() > 0


def peak_bytes(expert, steps, checkpointed):
    """The most memory that a trajectory and its gradients hold at once."""
    counts, (noise, condition) = prunable_units(expert.model), drawn(64)
    masks = torch.ones(sum(counts.values()), requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        clean = sample_with_masks(expert, split(masks, counts), noise, condition, steps, checkpointed=checkpointed)
        clean.square().mean().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).amax())


def test_memory_does_not_grow_with_the_steps_of_a_trajectory():
    expert = expert_of(DIT)
    expert.model.requires_grad_(False)
    peaks = {(steps, kept): peak_bytes(expert, steps, kept) for steps in (3, 12) for kept in (False, True)}
    a_latent = 64 * 16 * 4
    assert peaks[12, True] < peaks[3, True] + 9 * 3 * a_latent
    assert peaks[12, False] > 3 * peaks[3, False]
    assert peaks[12, True] < 0.2 * peaks[12, False]


@pytest.mark.slow
@pytest.mark.parametrize(("by", "share"), [("units", 0.5), ("parameters", 0.2)])
def test_learned_masks_leave_better_samples_than_chance_and_magnitude(trained, by, share, tmp_path):
    found = {}
    before = copy.deepcopy(trained.model.state_dict())
    cases = [("learned", 0), ("magnitude", 0), ("random", 0), ("random", 1), ("random", 2)]
    for criterion, seed in cases:
        config = EcoDiffConfig(ratio=share, by=by, criterion=criterion, chain=6, mask_training=LEARNING, seed=seed)
        outcome = prune_ecodiff(trained, latents(), config, Workspace.at(tmp_path / f"{criterion}_{seed}"))
        found[criterion, seed] = outcome.details["relative_l2_of_samples"]
        assert outcome.details["parameters_after"] < outcome.details["parameters_before"]
        assert outcome.details["flops_ratio"] < 1 and outcome.modules > 0
    learned, magnitude = found.pop(("learned", 0)), found.pop(("magnitude", 0))
    assert learned < magnitude and learned < 0.7 * min(found.values())
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_every_network_loses_the_asked_share_and_learns_again(config, tmp_path):
    expert, short = expert_of(config), TrainingConfig(steps=3, batch_size=4, lr=0.1, warmup_steps=0)
    share = 0.02 if config.kind == "residual_mlp" else 0.1
    recipe = EcoDiffConfig(ratio=share, by="parameters", chain=2, mask_training=short, finetune=short)
    outcome = prune_ecodiff(expert, latents(), recipe, Workspace.at(tmp_path / "work"))
    whole, left = outcome.details["parameters_before"], outcome.details["parameters_after"]
    most = max(parameters_per_unit(expert.model).values())
    assert share * whole <= whole - left < share * whole + most
    assert unit_counts(outcome.expert.model) and outcome.flops > 0
    outcome.expert.save(tmp_path / "saved")
    noise, condition = drawn()
    loaded = Expert.load(tmp_path / "saved")
    with torch.no_grad():
        clean = [sample_with_masks(each, {}, noise, condition, 3) for each in (outcome.expert, loaded)]
    assert torch.equal(*clean)


def test_learning_that_was_stopped_gives_the_same_masks(tmp_path):
    config = EcoDiffConfig(
        chain=2, mask_training=TrainingConfig(steps=8, batch_size=4, lr=0.1, warmup_steps=0, checkpoint_every=2)
    )
    expert, polls = expert_of(DIT), []

    def stops():
        polls.append(1)
        return len(polls) == 5

    stopped = Workspace.at(tmp_path / "stopped")
    with pytest.raises(Preempted):
        prune_ecodiff(expert, latents(), config, dataclasses.replace(stopped, stopping=stops))
    again = prune_ecodiff(expert, latents(), config, stopped)
    whole = prune_ecodiff(expert, latents(), config, Workspace.at(tmp_path / "whole"))
    assert again.details == whole.details


def test_units_of_every_kind_go_by_their_share_and_a_layer_keeps_one():
    model = expert_of(DIT).model
    scores = random_importance(prunable_units(model), 0)
    scores["transformer_blocks.0.attn1"] -= 10
    kept = select_units(model, scores, 0.5, "units")
    assert [len(kept[f"transformer_blocks.{block}.attn1"]) for block in (0, 1)] == [1, 3]
    assert sum(len(kept[f"transformer_blocks.{block}.ff"]) for block in (0, 1)) == 128
    assert set(magnitude_importance(model)) == set(scores)


def test_a_share_that_cannot_go_is_an_error(tmp_path):
    expert, space = expert_of(DIT), Workspace.at(tmp_path)
    for share, by, reason in ((0.9, "parameters", "lower the share"), (0.001, "units", "raise it")):
        with pytest.raises(StageError, match=reason):
            prune_ecodiff(expert, latents(), EcoDiffConfig(ratio=share, by=by, criterion="random"), space)
    with pytest.raises(StageError, match="found no heads"):
        nothing = dataclasses.replace(expert, model=torch.nn.Linear(2, 2))
        prune_ecodiff(nothing, latents(), EcoDiffConfig(), space)
