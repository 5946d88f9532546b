"""Adaptive caching: the dynamic program and the bubbling union."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble.compression.acceleration.adaptive_schedule import (
    bubbling_union,
    cosine_similarity,
    optimal_compute_steps,
    output_variation,
)
from ensemble.compression.acceleration.cacheable_modules import cacheable_modules
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.acceleration.feature_cache import ObservedModules, choose_steps
from ensemble.compression.method import StageError
from experts.compressed.pruning.layers import removable_layers, remove_layers
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.registry import build_network
from tests.experts.compressed.pruning.test_layers import NETWORKS as CLASSES
from tests.experts.compressed.pruning.test_layers import network


def objective(similarity, steps):
    """Compute the objective by its definition."""
    last = [max(step for step in steps if step <= t) for t in range(len(similarity))]
    return sum(similarity[last[t], t] for t in range(len(similarity)))


@given(st.integers(2, 8), st.integers(0, 10**6), st.data())
def test_chosen_steps_are_as_good_as_brute_force(steps, seed, data):
    count = data.draw(st.integers(1, steps))
    similarity = np.random.default_rng(seed).normal(size=(steps, steps))
    candidates = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
    best = max(objective(similarity, steps) for steps in candidates)
    chosen = optimal_compute_steps(similarity, count)
    assert chosen[0] == 0 and len(chosen) == count == len(set(chosen)) and list(chosen) == sorted(chosen)
    assert objective(similarity, chosen) == pytest.approx(best)


def test_more_compute_steps_than_steps_is_an_error():
    with pytest.raises(ValueError, match="of 3 steps, 1 to 3"):
        optimal_compute_steps(np.eye(3), 4)


def test_constant_outputs_are_similar_without_variation():
    outputs = torch.randn(1, 5, 7).expand(4, 5, 7)
    np.testing.assert_allclose(cosine_similarity(outputs), np.ones((4, 4)), atol=1e-12)
    assert output_variation(outputs) == 0
    other = torch.cat([outputs[:2], -outputs[2:]])
    assert cosine_similarity(other)[0, 2] == pytest.approx(-1) and output_variation(other) > 0


def test_bubbling_adds_steps_to_later_feed_forward_layers():
    updates = {"0.attn": (0, 3), "0.ff": (0, 1), "1.attn": (0, 4), "1.ff": (0, 2)}
    changes = {"0.attn": 1.0, "0.ff": 0.1, "1.attn": 5.0, "1.ff": 0.2}
    union = bubbling_union(updates, changes, 1, ["0.ff", "1.ff"])
    assert union == updates | {"1.ff": (0, 2, 4)}
    union = bubbling_union(updates, changes, 2, ["0.ff", "1.ff"])
    assert union == updates | {"0.ff": (0, 1, 3), "1.ff": (0, 2, 3, 4)}
    assert bubbling_union(updates, changes, 0, ["0.ff", "1.ff"]) == updates


(TEXT_UNET,) = (config for config in CLASSES if getattr(config, "class_name", "") == "UNet2DConditionModel")
NETWORKS = {
    "mlp": ResidualMLPConfig(width=8, depth=3),
    "unet": UNetConfig(channels=(8, 8), layers_per_block=1),
    "dit": DiTConfig(patch_size=4, heads=1, head_width=8, depth=3),
    "unet_text": TEXT_UNET,
}


@pytest.mark.parametrize("level", ["block", "layer", "unit"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_union_reaches_modules_of_every_network_and_level(kind, level):
    model = network(NETWORKS[kind])
    config = CacheConfig(policy="adaptive", level=level, interval=2)
    paths = cacheable_modules(model, config)
    generator = np.random.default_rng(0)
    observed = ObservedModules(
        similarities={path: generator.random((8, 8)) for path in paths},
        changes={path: -float(n) for n, path in enumerate(paths)},
    )
    alone = choose_steps(model, replace(config, bubbling=0), 8, observed)
    union = choose_steps(model, replace(config, bubbling=1), 8, observed)
    behind = [path for path in paths if ".attn" not in path and f".{path}".split(".")[-2] != "attentions"]
    assert behind and union == alone | {path: tuple(sorted({*alone[path], *alone[paths[0]]})) for path in behind}


def test_network_without_cacheable_modules_names_its_layers():
    model = build_network(NETWORKS["mlp"], (1, 8, 8), 2)
    remove_layers(model, removable_layers(model))
    with pytest.raises(StageError, match=r"nothing would be cached; .*\(its layers: .* Linear"):
        cacheable_modules(model, CacheConfig())
