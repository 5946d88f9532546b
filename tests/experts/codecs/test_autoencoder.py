"""diffusers' autoencoders: five ways to scale latents and their inverses, training, files of strangers."""

import json
from dataclasses import replace
from importlib.util import find_spec

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_partition.shards.shards import Sample, ShardWriter, read_batches
from ddm_core.artifacts import CorruptArtifact, Preempted, Workspace
from experts.codecs.autoencoder import AutoencoderCodec, model_grid, raw_latents, to_images, to_latents
from experts.codecs.registry import CODECS, fit_codec, load_codec
from experts.config import CodecConfig, TrainingConfig
from experts.errors import CodecError
from experts.networks.autoencoder_files import LatentGrid, path_checksum
from experts.networks.latent_shapes import latent_shape_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
LAYERS = {
    f"{part}_{key}": value
    for part in ("encoder", "decoder")
    for key, value in {"block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}.items()
}
MODELS = {
    "kl": lambda: diffusers.AutoencoderKL(**BLOCKS),
    "kl with a shift": lambda: diffusers.AutoencoderKL(**BLOCKS, scaling_factor=1.5, shift_factor=0.06),
    "kl with statistics": lambda: diffusers.AutoencoderKL(
        **BLOCKS, scaling_factor=0.5, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
    ),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.7,
    ),
    "dc": lambda: diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.4, **LAYERS),
    "flux2": lambda: diffusers.AutoencoderKLFlux2(latent_channels=4, **BLOCKS),
    "rae": lambda: diffusers.AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=8, encoder_input_size=16, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, scaling_factor=2.0,
    ),
}  # fmt: skip
SHAPES = {"flux2": (16, 4, 4), "rae": (64, 2, 2)}


def build(name):
    if name == "rae" and find_spec("transformers") is None:
        pytest.skip("AutoencoderRAE needs transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        if name == "flux2":
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 2)
    return model


def write_shards(folder, shape=(16, 16, 3), count=20):
    writer, draws = ShardWriter(folder), np.random.default_rng(0)
    for number in range(count):
        writer.add(Sample(key=f"{number:02d}", image=draws.integers(0, 256, shape).astype(np.uint8)))
    writer.close()
    return folder


@pytest.fixture
def color_shards(tmp_path):
    return write_shards(tmp_path / "color")


@pytest.fixture
def published(tmp_path):
    build("tiny").save_pretrained(tmp_path / "published")
    return tmp_path / "published"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scaling_is_the_class_s_own_and_has_an_inverse(name):
    model, images = build(name), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = to_latents(model, images)
    assert latents.shape == (2, *SHAPES.get(name, (4, 8, 8))) == (2, *model_grid(model).shape((16, 16, 3)))
    assert torch.equal(latents, to_latents(model, images))
    if name == "rae":
        assert torch.equal(to_images(model, latents), model((images + 1) / 2).sample * 2 - 1)
        return
    raw = raw_latents(model, images)
    decoded = model.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(to_images(model, latents), decoded, rtol=1e-5, atol=1e-5)
    expected = {
        "kl": lambda: raw * 0.18215,
        "kl with a shift": lambda: (raw - 0.06) * 1.5,
        "kl with statistics": lambda: (raw - _column(0.1, 0.2, 0.3, 0.4)) * 0.5 / _column(1.0, 2.0, 3.0, 4.0),
        "tiny": lambda: raw * 0.7,
        "dc": lambda: raw * 0.4,
        "flux2": lambda: model.bn(torch.nn.functional.pixel_unshuffle(raw, 2)),
    }
    torch.testing.assert_close(latents, expected[name]())


def _column(*values):
    return torch.tensor(values).view(-1, 1, 1)


@pytest.mark.parametrize("name", MODELS)
def test_published_autoencoder_is_copied_bit_for_bit(name, color_shards, tmp_path, workspace):
    model = build(name)
    model.save_pretrained(tmp_path / "published")
    config = CodecConfig(kind="autoencoder", path=str(tmp_path / "published"))
    fit_codec(config, color_shards, tmp_path / "codec", workspace)
    codec, images = load_codec(tmp_path / "codec"), next(read_batches(color_shards, 20)).images
    assert codec.latent_shape == latent_shape_of(config, 16, 3) == SHAPES.get(name, (4, 8, 8))
    own, latents = AutoencoderCodec(image_shape=(16, 16, 3), model=model), codec.encode(images)
    assert torch.equal(latents, own.encode(images))
    decoded = codec.decode(latents)
    assert torch.equal(decoded, own.decode(latents)) and decoded.shape == images.shape
    assert decoded.min() >= 0 and decoded.max() <= 1


@pytest.mark.parametrize("kind", [kind for kind in CODECS if kind.startswith("autoencoder_")])
def test_trained_latents_have_unit_scale_and_training_resumes(kind, color_shards, tmp_path):
    training = TrainingConfig(steps=12, batch_size=8, warmup_steps=1, checkpoint_every=5, lr=3e-3)
    config = CodecConfig(kind=kind, patch_size=2, latent_channels=4, decoder_width=8, decoder_training=training)
    fit_codec(config, color_shards, tmp_path / "whole", Workspace.at(tmp_path / "work"))
    codec, images = load_codec(tmp_path / "whole"), next(read_batches(color_shards, 20)).images
    latents = codec.encode(images)
    assert codec.latent_shape == (4, 8, 8) == latent_shape_of(config, 16, 3)
    assert latents.square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)
    assert codec.decode(latents).shape == images.shape
    row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (row["divergence"] > 0) == (kind == "autoencoder_kl")
    stopped = Workspace.at(tmp_path / "stopped")
    (tmp_path / "stopped" / "stop").touch()
    with pytest.raises(Preempted):
        fit_codec(config, color_shards, tmp_path / "again", stopped)
    (tmp_path / "stopped" / "stop").unlink()
    fit_codec(config, color_shards, tmp_path / "again", stopped)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert all((tmp_path / "whole" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_training_lowers_the_error(tmp_path):
    shards = write_shards(tmp_path / "shards", count=4)
    training = TrainingConfig(steps=60, batch_size=4, warmup_steps=5, log_every=20, lr=1e-2)
    config = CodecConfig(kind="autoencoder_dc", patch_size=2, latent_channels=8, decoder_width=8)
    fit_codec(replace(config, decoder_training=training), shards, tmp_path / "codec", Workspace.at(tmp_path / "work"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "codec" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_gray_images_are_repeated_and_averaged_back(published, tmp_path, workspace):
    shards = write_shards(tmp_path / "gray", (16, 16, 1))
    fit_codec(CodecConfig(kind="autoencoder", path=str(published)), shards, tmp_path / "codec", workspace)
    codec, gray = load_codec(tmp_path / "codec"), next(read_batches(shards, 20)).images
    color = AutoencoderCodec(image_shape=(16, 16, 3), model=codec.model)
    latents = codec.encode(gray)
    assert torch.equal(latents, color.encode(gray.repeat(3, axis=3)))
    expected = to_images(codec.model, latents).mean(1).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latents)[..., 0], expected.detach())


def test_autoencoder_of_channels_that_no_image_has_is_refused():
    with pytest.raises(CodecError, match="of 4 channels, not 3; images have 1 or 3, so choose another codec"):
        LatentGrid(image_channels=4, channels=4, factor=8).shape((16, 16, 3))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 16, 4), "takes images of 3 channels, not 4; set data.channels=3"),
        ((15, 16, 3), "a multiple of 2, not 15x15"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message, published, tmp_path, workspace):
    shards = write_shards(tmp_path / "shards", shape)
    with pytest.raises(CodecError, match=message):
        fit_codec(CodecConfig(kind="autoencoder", path=str(published)), shards, tmp_path / "codec", workspace)
    assert not (tmp_path / "codec").exists()


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_every_missing_and_extra_key_is_named(change, published, color_shards, tmp_path, workspace):
    tensors = load_file(published / WEIGHTS)
    names = [f"decoder.{number:03d}.{'x' * 30}" for number in range(40)] if change == "extra" else list(tensors)[3:]
    changed = {k: v for k, v in tensors.items() if k not in names} if change == "missing" else tensors | {
        name: torch.zeros(1) for name in names
    }  # fmt: skip
    save_file(changed, published / WEIGHTS)
    with pytest.raises(CorruptArtifact) as caught:
        fit_codec(CodecConfig(kind="autoencoder", path=str(published)), color_shards, tmp_path / "codec", workspace)
    assert all(name in str(caught.value) for name in names)


def test_pickle_is_refused(published, color_shards, tmp_path, workspace):
    torch.save(load_file(published / WEIGHTS), published / "diffusion_pytorch_model.bin")
    (published / WEIGHTS).unlink()
    with pytest.raises(CorruptArtifact, match="pickles are not read"):
        fit_codec(CodecConfig(kind="autoencoder", path=str(published)), color_shards, tmp_path / "codec", workspace)
    with pytest.raises(CodecError, match="pickles are not read"):
        path_checksum(str(published))


def test_changed_files_are_refused(published, color_shards, tmp_path, workspace):
    config = CodecConfig(kind="autoencoder", path=str(published), path_checksum=path_checksum(str(published)))
    tensors = load_file(published / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, published / WEIGHTS)
    with pytest.raises(CodecError, match="has changed since"):
        fit_codec(config, color_shards, tmp_path / "codec", workspace)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CodecConfig(kind="autoencoder"), "set both or none"),
        (CodecConfig(kind="autoencoder_kl", path="x/y"), "set both or none"),
        (
            CodecConfig(kind="autoencoder", path="/nowhere"),
            "must be a folder with a diffusers autoencoder, or its name",
        ),
        (CodecConfig(kind="autoencoder_kl", patch_size=3), "power of two, not 3"),
        (CodecConfig(kind="autoencoder_kl", patch_size=32), "a multiple of 32, not 16x16"),
    ],
)
def test_configuration_that_cannot_work_is_refused(config, message):
    with pytest.raises(CodecError, match=message):
        latent_shape_of(config, 16, 3)


@pytest.mark.parametrize("settings", [{}, {"_class_name": "UNet2DModel"}, {"_class_name": "AutoencoderKL"}, []])
def test_folder_without_an_autoencoder_is_refused(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        CodecError, match=r"must be of class AutoencoderKL|config.json of an AutoencoderKL is not valid"
    ):
        latent_shape_of(CodecConfig(kind="autoencoder", path=str(tmp_path)), 16, 3)
