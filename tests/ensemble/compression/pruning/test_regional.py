"""Attention to regions and summaries: its equation, where it is exact, and every class of network that has maps."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arms.paper_networks import select_digits
from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import calibration_batches, run_network
from ensemble.compression.method import StageError
from ensemble.compression.pruning.config import RegionalConfig
from ensemble.compression.pruning.regional import prune_regional
from experts.compressed.attention.regional import RegionalSummary
from experts.compressed.pruning.units import prune_units, unit_groups
from experts.compressed.quantization.attention_quant import attention_layers
from experts.config import DiffusersConfig, DiTConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from tests.ensemble.compression.trained import digits, trained

SIDE = 4
SETTINGS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "caption_projection_dim": 16}
UNET = {
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
NETWORKS = {
    "unet": DiffusersConfig(class_name="UNet2DModel", settings=UNET),
    "dit": DiTConfig(patch_size=1, heads=2, head_width=8, depth=2),
    "mmdit": DiffusersConfig(class_name="SD3Transformer2DModel", settings=SETTINGS | {"patch_size": 1}),
}
CONFIG = RegionalConfig(min_tokens=64, rows=16, finetune=None)
each_network = pytest.mark.parametrize("kind", NETWORKS)


def operands(seed, texts=0, rows=2, heads=3, width=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, SIDE * SIDE + texts, width, generator=generator).double() for _ in range(3)]


def summary_of(region, seed=None):
    summary = RegionalSummary(3, SIDE, SIDE, region).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for logits in summary.parameters():
            logits.data.normal_(generator=generator)
    return summary


def by_the_equation(query, key, value, region, summary):
    """Return the attention of every token of a map, one query at a time."""
    count, result = SIDE * SIDE, torch.zeros_like(query)
    region_of = [(i // SIDE // region, i % SIDE // region) for i in range(count)]
    members = {name: [i for i in range(count) if region_of[i] == name] for name in region_of}
    for head in range(query.shape[1]):
        a, c = (logits[head].softmax(0) for logits in (summary.key_logits, summary.value_logits))
        for i in range(count):
            keys = [key[:, head, j] for j in members[region_of[i]]]
            values, biases = [value[:, head, j] for j in members[region_of[i]]], [0.0] * region**2
            for name, tokens in members.items():
                if name != region_of[i]:
                    keys.append(sum(weight * key[:, head, j] for weight, j in zip(a, tokens, strict=True)))
                    values.append(sum(weight * value[:, head, j] for weight, j in zip(c, tokens, strict=True)))
                    biases.append(math.log(region**2))
            for j in range(count, key.shape[2]):
                keys, values, biases = [*keys, key[:, head, j]], [*values, value[:, head, j]], [*biases, 0.0]
            scores = (query[:, head, i, None] * torch.stack(keys, 1)).sum(-1) / math.sqrt(query.shape[-1])
            gates = (scores + torch.tensor(biases)).softmax(-1)
            result[:, head, i] = (gates[..., None] * torch.stack(values, 1)).sum(1)
    result[:, :, count:] = functional.scaled_dot_product_attention(query[:, :, count:], key, value)
    return result


@pytest.mark.parametrize("texts", [0, 3])
def test_attention_by_regions_equals_its_equation(texts):
    summary, parts = summary_of(2, seed=1), operands(0, texts)
    torch.testing.assert_close(summary(*parts), by_the_equation(*parts, 2, summary))


@given(st.integers(0, 1000), st.sampled_from([1, SIDE]), st.integers(0, 2))
def test_one_region_and_regions_of_one_token_are_plain_attention(seed, region, texts):
    parts = operands(seed, texts)
    torch.testing.assert_close(summary_of(region)(*parts), functional.scaled_dot_product_attention(*parts))


@given(st.integers(0, 1000))
def test_equal_tokens_of_a_region_are_summarized_exactly(seed):
    query, key, value = operands(seed)
    summary = summary_of(2, seed)
    flat = [summary.to_map(summary.to_regions(part)[:, :, :, :1].expand(-1, -1, -1, 4, -1)) for part in (key, value)]
    torch.testing.assert_close(summary(query, *flat), functional.scaled_dot_product_attention(query, *flat))
    assert not torch.allclose(summary(query, key, value), functional.scaled_dot_product_attention(query, key, value))


def test_what_regions_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="regions of side 3 do not divide a map of 4 x 4"):
        RegionalSummary(1, 4, 4, 3)
    with pytest.raises(ValueError, match="sample at the size of the training"):
        summary_of(2)(*(part[:, :, :8] for part in operands(0)))
    with pytest.raises(ValueError, match="takes no mask"):
        summary_of(2)(*operands(0), attn_mask=torch.ones(16, 16, dtype=torch.bool))


def expert_of(kind):
    dataset = select_digits("mmdit" if kind == "mmdit" else "dit", held_out=False)
    num_classes = 0 if kind == "mmdit" else 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(NETWORKS[kind], (1, 8, 8), num_classes, dataset.null_text)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    expert = Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=num_classes,
        cluster_id=0,
    )
    return expert, dataset


@each_network
def test_every_large_map_is_divided_and_costs_less(kind, tmp_path):
    expert, dataset = expert_of(kind)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    result = prune_regional(expert, dataset, CONFIG, Workspace.at(tmp_path / "work"))
    divided, batch = result.network, calibration_batches(dataset, 5, 0, 1)[0]
    assert result.modules == len(result.details["layers"]) == {"unet": 3, "dit": 2, "mmdit": 2}[kind]
    assert all(entry["region"] in (2, 4) and share == 20 / 64 for entry, share in _pairs(result))
    assert result.details["flops"] < 1 and 0 < result.details["error_divided"] < 1
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())
    divided.save(tmp_path / "divided")
    loaded = Expert.load(tmp_path / "divided")
    with torch.no_grad():
        output = run_network(divided.model, divided, batch)
        torch.testing.assert_close(run_network(loaded.model, loaded, batch), output, atol=1e-6, rtol=1e-5)
        alone = run_network(loaded.model, loaded, batch.rows(slice(0, 1)))
        whole = run_network(expert.model, expert, batch)
    torch.testing.assert_close(alone, output[:1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output, whole)


def _pairs(result):
    return zip(result.details["layers"].values(), result.details["keys"].values(), strict=True)


def test_training_brings_the_output_back(tmp_path):
    expert = trained("dit", Workspace.at(tmp_path / "trained"))
    tuning = TrainingConfig(steps=80, batch_size=32, lr=1e-3, warmup_steps=2)
    config = replace(CONFIG, min_tokens=16, finetune=tuning, output_weight=100.0, feature_weight=0.0)
    result = prune_regional(expert, digits(), config, Workspace.at(tmp_path / "work"))
    details, summaries = result.details, [m for m in result.network.model.modules() if isinstance(m, RegionalSummary)]
    assert details["error_finetuned"] < 0.8 * details["error_divided"]
    assert all(summary.key_logits.abs().max() > 0 for summary in summaries)


def test_smaller_maps_stay_and_none_is_an_error(tmp_path):
    expert, dataset = expert_of("unet")
    with pytest.raises(StageError, match=r"at least 65 tokens .* has down_blocks\.0\.attentions\.0 8 x 8"):
        prune_regional(expert, dataset, replace(CONFIG, min_tokens=65), Workspace.at(tmp_path))
    every = prune_regional(expert, dataset, replace(CONFIG, min_tokens=16), Workspace.at(tmp_path)).details["layers"]
    assert {entry["height"] for entry in every.values()} == {8, 4}
    with pytest.raises(StageError, match="squares of side 3 or more"):
        prune_regional(expert, dataset, replace(CONFIG, region=3), Workspace.at(tmp_path))
    flat = replace(expert, model=build_network(ResidualMLPConfig(width=16, depth=1), (1, 8, 8), 10))
    with pytest.raises(StageError, match=r"expert 0 has no map of attention; .*its layers: 7 Linear"):
        prune_regional(flat, dataset, CONFIG, Workspace.at(tmp_path))


def test_heads_of_divided_layers_can_be_pruned_and_saved(tmp_path):
    expert, dataset = expert_of("dit")
    divided = prune_regional(expert, dataset, CONFIG, Workspace.at(tmp_path / "work")).network
    for number, summary in enumerate(m for m in divided.model.modules() if isinstance(m, RegionalSummary)):
        summary.key_logits.data.normal_(generator=torch.Generator().manual_seed(number))
    batch, silenced = calibration_batches(dataset, 3, 0, 1)[0], deepcopy(divided.model)
    heads = [path for path in unit_groups(silenced) if path.endswith("attn1")]
    for path in heads:
        silenced.get_submodule(f"{path}.to_out.0").weight.data[:, :8] = 0.0
    prune_units(divided.model, dict.fromkeys(heads, [1]))
    divided.save(tmp_path / "pruned")
    loaded = Expert.load(tmp_path / "pruned")
    with torch.no_grad():
        expected = run_network(silenced, expert, batch)
        torch.testing.assert_close(run_network(loaded.model, loaded, batch), expected, atol=1e-5, rtol=1e-5)
    assert not attention_layers(loaded.model) and attention_layers(expert.model)
