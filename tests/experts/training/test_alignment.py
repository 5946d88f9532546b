"""Alignment of tokens with a teacher's features: its value, its end, its refusals, and what is left of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_partition.features.efficientnet import EfficientNetFeatures
from data_partition.features.pca import l2_normalize
from data_partition.features.random_conv import compute_responses, make_random_filters
from data_partition.features.tokens import TOKEN_NETWORKS, compute_tokens
from ddm_core.artifacts import Preempted, Workspace
from experts.codec import PixelCodec
from experts.codecs.registry import fit_codec
from experts.config import CodecConfig, DiTConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.expert import Expert, train_expert
from experts.networks.class_settings import NetworkError
from experts.networks.registry import build_network
from experts.training.alignment import align, find_tokens
from experts.training.latent_dataset import make_batch
from tests.experts.training.test_trainer import velocity_loss

DIT = DiTConfig(patch_size=2, heads=2, head_width=8, depth=2)
TRAINING = TrainingConfig(steps=12, batch_size=8, warmup_steps=2, log_every=3, checkpoint_every=4, lr=5e-3)
EXPERT = ExpertConfig(
    network=DIT, training=TRAINING, align_weight=0.5, align_teacher="random_conv", align_until=0.75, align_block=1
)
CODEC = PixelCodec(image_shape=(8, 8, 3))


def aligned(config=EXPERT, network=DIT):
    return align(config, build_network(network, CODEC.latent_shape, 3), velocity_loss, CODEC)


def test_loss_is_that_of_the_network_and_one_minus_the_cosine(make_dataset):
    model, loss = aligned()
    dataset = make_dataset(shape=CODEC.latent_shape)
    batch = make_batch(dataset, TRAINING, 3)
    alone = velocity_loss(model.network, batch)["loss"]
    terms = loss(model, batch)
    assert torch.equal(terms["loss"], alone + 0.5 * (1 - terms["alignment"])) and -1 <= terms["alignment"] < 0.9
    target = compute_tokens(loss.teacher, CODEC.decode(batch.clean).permute(0, 3, 1, 2), 4, 4)
    model.projection = nn.Flatten(0, -1)
    model.projection.forward = lambda tokens: 3 * target
    torch.testing.assert_close(loss(model, batch)["loss"], alone)
    assert loss(model, make_batch(dataset, TRAINING, 9)).keys() == {"loss"}, "no alignment after its last step"


@pytest.mark.parametrize("name", TOKEN_NETWORKS)
def test_teacher_is_the_network_that_clusters(name):
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    grid = TOKEN_NETWORKS[name]()(pixels)
    if name == "random_conv":
        expected = compute_responses(make_random_filters(0), images)
        np.testing.assert_allclose(grid.flatten(1), expected, rtol=1e-4, atol=1e-5)
    else:
        expected = EfficientNetFeatures.load(Path())(images)
        np.testing.assert_allclose(l2_normalize(grid.mean(dim=(2, 3)).numpy()), expected, rtol=1e-3, atol=1e-5)
    tokens = compute_tokens(TOKEN_NETWORKS[name](), pixels, *grid.shape[2:])
    torch.testing.assert_close(tokens[:, 1], nn.functional.normalize(grid[:, :, 0, 1], dim=-1))


@pytest.mark.parametrize(
    ("config", "network", "message"),
    [
        (EXPERT, ResidualMLPConfig(width=16, depth=2), "grid of patches"),
        (EXPERT, UNetConfig(channels=(8, 16)), "0 transformer blocks"),
        (replace(EXPERT, align_block=3), DIT, "2 transformer blocks"),
    ],
)
def test_network_without_such_tokens_is_refused(config, network, message):
    with pytest.raises(NetworkError, match=message):
        aligned(config, network)


def test_tokens_of_the_image_are_the_last_that_fit_its_grid():
    text, image = torch.zeros(1, 7, 5), torch.zeros(1, 16, 5)
    assert find_tokens([(text, image)], (3, 8, 8)) == (image, (4, 4))
    assert find_tokens([torch.zeros(1, 8, 5)], (3, 4, 8))[1] == (2, 4)


def test_expert_keeps_nothing_of_its_alignment_and_resumes(shards, tmp_path):
    codec = tmp_path / "codec"
    fit_codec(CodecConfig(kind="pixels"), shards, codec, Workspace.at(tmp_path / "codec_work"))

    def train(name, config, workspace):
        (tmp_path / name).mkdir(exist_ok=True)
        summary = train_expert(config, [shards], codec, tmp_path / name, workspace)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return summary, rows, (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes()

    plain, _, other_bytes = train("plain", replace(EXPERT, align_weight=0.0), Workspace.at(tmp_path / "a"))
    summary, rows, expected = train("aligned", EXPERT, Workspace.at(tmp_path / "b"))
    assert expected != other_bytes and summary.parameters == plain.parameters and summary.flops > plain.flops
    assert [("alignment" in row) for row in rows] == [True, True, True, False]
    assert rows[2]["alignment"] > rows[0]["alignment"]
    assert type(Expert.load(tmp_path / "aligned").model).__name__ == "DiTTransformer2DModel"
    calls = iter(range(100))
    with pytest.raises(Preempted):
        train("stopped", EXPERT, replace(Workspace.at(tmp_path / "c"), stopping=lambda: next(calls) == 6))
    assert train("stopped", EXPERT, Workspace.at(tmp_path / "c"))[1:] == (rows, expected)
