"""Alignment of tokens with a teacher's features: its value, its end, its refusals, and what is left of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from benchmarks.testbed.backbones import SHAPE, TINY, adapter_of, build, config_of
from data_partition.errors import UnknownExtractor
from data_partition.features.efficientnet import EfficientNetFeatures
from data_partition.features.pca import l2_normalize
from data_partition.features.random_conv import compute_responses, make_random_filters
from data_partition.features.tokens import TOKEN_NETWORKS, compute_tokens
from data_partition.features.vision_model import IMAGENET, VisionFeatures
from ddm_core.artifacts import Preempted, Workspace
from experts.codec import PixelCodec
from experts.codecs.registry import fit_codec
from experts.config import CodecConfig, DiTConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.expert import Expert, train_expert
from experts.networks.alignment_settings import check_alignment
from experts.networks.class_settings import NetworkError
from experts.networks.registry import build_network
from experts.training.alignment import AlignedNetwork, align, find_tokens
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


@pytest.mark.parametrize("name", ["random_conv", "efficientnet_lite0"])
def test_teacher_is_the_network_that_clusters(name):
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    grid = TOKEN_NETWORKS[name](None)(pixels)
    if name == "random_conv":
        expected = compute_responses(make_random_filters(0), images)
        np.testing.assert_allclose(grid.flatten(1), expected, rtol=1e-4, atol=1e-5)
    else:
        expected = EfficientNetFeatures.load(Path())(images)
        np.testing.assert_allclose(l2_normalize(grid.mean(dim=(2, 3)).numpy()), expected, rtol=1e-3, atol=1e-5)
    tokens = compute_tokens(TOKEN_NETWORKS[name](None), pixels, *grid.shape[2:])
    torch.testing.assert_close(tokens[:, 1], nn.functional.normalize(grid[:, :, 0, 1], dim=-1))


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGE = {"image_size": 32, "patch_size": 8}
VISION_NETWORKS = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **IMAGE)),
    "registers": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIZES, **IMAGE, num_register_tokens=4)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **IMAGE)),
    "convolutions": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64)
    ),
}


@pytest.mark.parametrize(("name", "grid"), [("dinov2", 4), ("registers", 4), ("siglip", 4), ("convolutions", 2)])
def test_vision_network_teaches_by_its_patches(name, grid, make_dataset, tmp_path):
    torch.manual_seed(0)
    VISION_NETWORKS[name]().save_pretrained(tmp_path)
    network = transformers.AutoModel.from_pretrained(tmp_path)
    config = replace(EXPERT, align_teacher="transformers", align_path=str(tmp_path))
    model, loss = aligned(config)
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        scaled = nn.functional.interpolate(images, (network.config.image_size,) * 2, mode="bilinear", antialias=True)
        mean, deviation = (torch.tensor(part)[:, None, None] for part in IMAGENET)
        hidden = getattr(network, "vision_model", network)((scaled - mean) / deviation).last_hidden_state
    found = loss.teacher(images)
    assert found.shape == (3, 16, grid, grid)
    expected = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected[:, -grid * grid :])
    batch = make_batch(make_dataset(shape=CODEC.latent_shape), TRAINING, 3)
    assert -1 <= loss(model, batch)["alignment"] <= 1


def test_patches_keep_their_places(tmp_path):
    VISION_NETWORKS["dinov2"]().save_pretrained(tmp_path)
    network = VisionFeatures.open(tmp_path)
    with torch.no_grad():
        for layer in network.network.encoder.layer:
            layer.attention.o_proj.weight.zero_()
        network.network.embeddings.position_embeddings.zero_()
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] = 0
    moved = (network.compute_patches(images) - network.compute_patches(changed)).abs().amax((0, 1)) > 1e-4
    assert moved.nonzero().tolist() == [[1, 2]]


def test_vision_network_needs_its_folder(tmp_path):
    with pytest.raises(ValidationError, match="needs expert.align_path"):
        ExpertConfig(align_teacher="transformers")
    with pytest.raises(ValidationError, match="other teachers have none"):
        ExpertConfig(align_path=str(tmp_path))
    with pytest.raises(UnknownExtractor, match="does not hold a vision network"):
        aligned(replace(EXPERT, align_teacher="transformers", align_path=str(tmp_path)))


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


@pytest.mark.parametrize("case", [case for case in TINY if "Transformer" in case])
def test_every_transformer_is_aligned_or_refused_before_a_run(case):
    config = ExpertConfig(network=config_of(case), align_weight=0.5, align_block=1)
    if adapter_of(case).has_image_tokens:
        check_alignment(config)
        AlignedNetwork(build(case), SHAPE, 1, 4)
        with pytest.raises(NetworkError, match=r"is past the \d blocks"):
            check_alignment(replace(config, align_block=9))
    else:
        with pytest.raises(NetworkError, match="return those of image and text together; choose one of DiT"):
            check_alignment(config)
        with pytest.raises(NetworkError, match="needs the tokens of a grid"):
            AlignedNetwork(build(case), SHAPE, 1, 4)


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
