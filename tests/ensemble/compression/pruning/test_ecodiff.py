"""EcoDiff: exact gradients along trajectories at constant memory, and masks that beat chance."""

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
from experts.conditions.condition import Condition
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


def build_expert(config):
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
    """Return latents of three patterns, each with its own brightness."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, *SHAPE, generator=generator)
    classes = torch.arange(count) % 3
    brightness = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    clean = patterns[classes] * brightness + 0.1 * torch.randn(count, *SHAPE, generator=generator)
    return LatentDataset(clean=clean, class_id=classes, cluster_id=torch.zeros_like(classes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    expert, training = build_expert(DIT), TrainingConfig(steps=250, batch_size=64, lr=3e-3, warmup_steps=20)
    torch.manual_seed(0)
    model = build_network(DIT, SHAPE, 3)

    def loss(model, batch):
        return {"loss": expert_loss(model, batch, expert.prediction, expert.noise_schedule)}

    fitted = fit(model, loss, latents(), training, Workspace.at(tmp_path_factory.mktemp("trained")))
    return dataclasses.replace(expert, model=fitted.model)


def noise_and_condition(rows=6):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, *SHAPE, generator=generator), Condition(torch.arange(rows) % 3)


def test_gates_are_closed_and_open_with_known_probability():
    logits = torch.linspace(-4, 4, 9)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = torch.stack([hard_concrete(logits.double(), row.expand(9)) for row in uniform[:4000]])
    bound = BETA * torch.tensor(-GAMMA / ZETA).log()
    torch.testing.assert_close((gates == 0).double().mean(0), torch.sigmoid(bound - logits).double(), atol=0.03, rtol=0)
    torch.testing.assert_close((gates == 1).double().mean(0), torch.sigmoid(logits + bound).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(gates.mean(0) + gates.mean(0).flip(0), torch.ones(9).double(), atol=0.05, rtol=0)


def test_gates_without_noise_are_deterministic():
    gates = Gates(3, 0.0, 0.0)
    assert torch.equal(gates(), torch.full((3,), 0.5)) and torch.equal(gates(), gates())
    assert not torch.equal(Gates(3, 0.0, 0.5)(), gates())


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_checkpointed_gradients_equal_plain_gradients(config):
    expert = build_expert(config)
    counts, (noise, condition), results = prunable_units(expert.model), noise_and_condition(), []
    for checkpointed in (False, True):
        masks = torch.linspace(0.2, 1, sum(counts.values())).requires_grad_()
        clean = sample_with_masks(expert, split(masks, counts), noise, condition, 4, checkpointed=checkpointed)
        clean.square().mean().backward()
        results.append((clean.detach(), masks.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-5)
    assert results[0][1].abs().amax() > 0


def peak_bytes(expert, steps, checkpointed):
    """Return the peak memory of a trajectory and its gradients."""
    counts, (noise, condition) = prunable_units(expert.model), noise_and_condition(64)
    masks = torch.ones(sum(counts.values()), requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        clean = sample_with_masks(expert, split(masks, counts), noise, condition, steps, checkpointed=checkpointed)
        clean.square().mean().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocations = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(allocations.cumsum(0).amax())


def test_memory_does_not_grow_with_the_number_of_steps():
    expert = build_expert(DIT)
    expert.model.requires_grad_(False)
    peaks = {(steps, flag): peak_bytes(expert, steps, flag) for steps in (3, 12) for flag in (False, True)}
    latent_bytes = 64 * 16 * 4
    assert peaks[12, True] < peaks[3, True] + 9 * 3 * latent_bytes
    assert peaks[12, False] > 3 * peaks[3, False]
    assert peaks[12, True] < 0.2 * peaks[12, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "share"), [pytest.param("units", 0.5, marks=pytest.mark.integration), ("parameters", 0.2)]
)
def test_learned_masks_beat_chance_and_magnitude(trained, by, share, tmp_path):
    errors = {}
    before = copy.deepcopy(trained.model.state_dict())
    cases = [("learned", 0), ("magnitude", 0), ("random", 0), ("random", 1), ("random", 2)]
    for criterion, seed in cases:
        config = EcoDiffConfig(ratio=share, by=by, criterion=criterion, chain=6, mask_training=LEARNING, seed=seed)
        result = prune_ecodiff(trained, latents(), config, Workspace.at(tmp_path / f"{criterion}_{seed}"))
        errors[criterion, seed] = result.details["relative_l2_of_samples"]
        assert result.details["parameters_after"] < result.details["parameters_before"]
        assert result.details["flops_ratio"] < 1 and result.modules > 0
    learned, magnitude = errors.pop(("learned", 0)), errors.pop(("magnitude", 0))
    assert learned < magnitude and learned < 0.7 * min(errors.values())
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_every_network_loses_the_configured_share(config, tmp_path):
    expert, short = build_expert(config), TrainingConfig(steps=3, batch_size=4, lr=0.1, warmup_steps=0)
    share = 0.02 if config.kind == "residual_mlp" else 0.1
    pruning = EcoDiffConfig(ratio=share, by="parameters", chain=2, mask_training=short, finetune=short)
    result = prune_ecodiff(expert, latents(), pruning, Workspace.at(tmp_path / "work"))
    before, after = result.details["parameters_before"], result.details["parameters_after"]
    largest = max(parameters_per_unit(expert.model).values())
    assert share * before <= before - after < share * before + largest
    assert unit_counts(result.expert.model) and result.flops > 0
    result.expert.save(tmp_path / "saved")
    noise, condition = noise_and_condition()
    loaded = Expert.load(tmp_path / "saved")
    with torch.no_grad():
        clean = [sample_with_masks(each, {}, noise, condition, 3) for each in (result.expert, loaded)]
    assert torch.equal(*clean)


def test_a_resumed_training_gives_the_same_masks(tmp_path):
    config = EcoDiffConfig(
        chain=2, mask_training=TrainingConfig(steps=8, batch_size=4, lr=0.1, warmup_steps=0, checkpoint_every=2)
    )
    expert, polls = build_expert(DIT), []

    def stops():
        polls.append(1)
        return len(polls) == 5

    stopped = Workspace.at(tmp_path / "stopped")
    with pytest.raises(Preempted):
        prune_ecodiff(expert, latents(), config, dataclasses.replace(stopped, stopping=stops))
    resumed = prune_ecodiff(expert, latents(), config, stopped)
    uninterrupted = prune_ecodiff(expert, latents(), config, Workspace.at(tmp_path / "uninterrupted"))
    assert resumed.details == uninterrupted.details


def test_each_kind_loses_its_share_and_a_layer_keeps_one():
    model = build_expert(DIT).model
    scores = random_importance(prunable_units(model), 0)
    scores["transformer_blocks.0.attn1"] -= 10
    remaining = select_units(model, scores, 0.5, "units")
    assert [len(remaining[f"transformer_blocks.{block}.attn1"]) for block in (0, 1)] == [1, 3]
    assert sum(len(remaining[f"transformer_blocks.{block}.ff"]) for block in (0, 1)) == 128
    assert set(magnitude_importance(model)) == set(scores)


def test_a_share_that_cannot_be_removed_is_an_error(tmp_path):
    expert, workspace = build_expert(DIT), Workspace.at(tmp_path)
    for share, by, reason in ((0.9, "parameters", "lower the ratio"), (0.001, "units", "raise it")):
        with pytest.raises(StageError, match=reason):
            prune_ecodiff(expert, latents(), EcoDiffConfig(ratio=share, by=by, criterion="random"), workspace)
    with pytest.raises(StageError, match="found no heads"):
        without_units = dataclasses.replace(expert, model=torch.nn.Linear(2, 2))
        prune_ecodiff(without_units, latents(), EcoDiffConfig(), workspace)
