"""The convolutional decoder: the latents of a linear codec, a lower image error, and a resumable training."""

import shutil
from dataclasses import replace

import pytest
import torch

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.shards.shards import read_batches
from ddm_core.artifacts import Preempted, Workspace, list_files
from experts.architectures.conv_decoder import ConvDecoder, decoder_loss
from experts.codec import ENCODER
from experts.codecs.refined import fit_decoder
from experts.codecs.registry import fit_codec, load_codec
from experts.config import CodecConfig, TrainingConfig
from experts.training.latents.shard_encoder import FrozenCodec

CONFIG = CodecConfig(
    kind="pca_conv",
    components=12,
    latent_channels=3,
    decoder_width=16,
    decoder_training=TrainingConfig(steps=400, batch_size=32, lr=4e-3, warmup_steps=10, checkpoint_every=20),
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    build_dataset(DataConfig(source="digits", image_size=8, limit=500), folder, Workspace.at(folder / "work"))
    return folder


def error(codec, images):
    return (codec.decode(codec.encode(images)) - torch.from_numpy(images).float() / 255).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pca", "patch_pca"])
def test_decoder_beats_linear_codec_on_unseen_images(name, digits, tmp_path):
    for kind in (name, f"{name}_conv"):
        fit_codec(replace(CONFIG, kind=kind), digits / "train", tmp_path / kind, Workspace.at(tmp_path / "work" / kind))
    linear, convolutional = load_codec(tmp_path / name), load_codec(tmp_path / f"{name}_conv")
    unseen = next(read_batches(digits / "holdout", 60)).images
    assert torch.equal(linear.encode(unseen), convolutional.encode(unseen))
    assert error(convolutional, unseen) < error(linear, unseen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pca_conv", "patch_pca_conv"])
def test_decoder_stopped_and_apart_from_its_codec_is_the_same(kind, digits, tmp_path):
    short_config = replace(CONFIG, kind=kind, decoder_training=replace(CONFIG.decoder_training, steps=60))
    whole, encoder, again = tmp_path / "whole", tmp_path / "encoder", tmp_path / "again"
    fit_codec(short_config, digits / "train", whole, Workspace.at(tmp_path / "work"))
    stopped = Workspace.at(tmp_path / "stopped")
    fit_codec(short_config.encoder, digits / "train", encoder, stopped)
    (tmp_path / "stopped" / "stop").touch()
    again.mkdir()
    with pytest.raises(Preempted):
        fit_decoder(short_config, encoder, digits / "train", again, stopped)
    (tmp_path / "stopped" / "stop").unlink()
    fit_decoder(short_config, encoder, digits / "train", again, stopped)
    assert folder_bytes(again) == folder_bytes(whole)
    known = [FrozenCodec.open(folder, load_codec(folder)).origin for folder in (encoder, again)]
    assert known[0] == known[1]
    shutil.copytree(again / ENCODER, old := tmp_path / "old")  # as folders were before they had one for the encoder
    shutil.copytree(again / "decoder", old / "decoder")
    shutil.copyfile(again / "codec.json", old / "codec.json")
    latents = torch.randn(3, *load_codec(old).latent_shape)
    assert torch.equal(load_codec(old).decode(latents), load_codec(again).decode(latents))


def folder_bytes(folder):
    return {file.relative_to(folder): file.read_bytes() for file in list_files(folder)}


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (30, 33, 3)])
def test_decoder_supports_any_image_shape(shape):
    height, width, channels = shape
    assert ConvDecoder(5, shape, 8)(torch.zeros(2, 5)).shape == (2, channels, height, width)
    images = torch.rand(2, channels, height, width)
    assert torch.equal(ConvDecoder(0, shape, 8)(images), images)  # before its training


def test_decoder_loss_counts_edges():
    image = torch.zeros(1, 1, 4, 4)
    step = image.clone()
    step[..., 2:] = 1.0
    assert decoder_loss(step, step) == 0
    assert decoder_loss(step, image).item() == pytest.approx(8 / 16 + 0 + 4 / 12)
