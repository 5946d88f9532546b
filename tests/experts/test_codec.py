import numpy as np
import pytest
import torch

from data_partition.shards.shards import read_batches
from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.codecs.registry import CODECS, fit_codec, load_codec
from experts.config import CodecConfig, TrainingConfig


@pytest.fixture
def images(shards):
    return next(read_batches(shards, 40)).images


def fit_and_load(kind, shards, out, workspace, whitening=0.0, components=16, **fields):
    short_training = TrainingConfig(steps=4, batch_size=8, warmup_steps=1)
    fields = {"patch_size": 2, "latent_channels": min(components, 4), "decoder_training": short_training} | fields
    config = CodecConfig(kind=kind, components=components, whitening=whitening, **fields)
    fit_codec(config, shards, out, workspace)
    return load_codec(out)


@pytest.mark.parametrize("kind", ["pixels", "pca", "patch_pca"])
def test_full_rank_codec_reproduces_images(kind, shards, images, tmp_path, workspace):
    """Use all 16 components of 4 x 4 pixels, or all 4 of 2 x 2."""
    codec = fit_and_load(kind, shards, tmp_path / "codec", workspace)
    latents = codec.encode(images)
    assert latents.shape == (40, *codec.latent_shape)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(codec.decode(latents), torch.from_numpy(images).float() / 255, rtol=0, atol=2e-5)


FITTED = [kind for kind in CODECS if kind != "autoencoder"]  # which needs files


@pytest.mark.parametrize("kind", FITTED)
def test_loaded_codec_equals_saved_codec(kind, shards, images, tmp_path, workspace):
    codec = fit_and_load(kind, shards, tmp_path / "codec", workspace, whitening=0.5, components=5)
    loaded = load_codec(tmp_path / "codec")
    assert loaded.latent_shape == codec.latent_shape
    assert torch.equal(loaded.encode(images), codec.encode(images))


@pytest.mark.parametrize("whitening", [0.0, 0.4, 1.0])
def test_latents_have_unit_root_mean_square(whitening, shards, images, tmp_path, workspace):
    codec = fit_and_load("pca", shards, tmp_path / "codec", workspace, whitening, components=6)
    latents = codec.encode(images)
    assert latents.square().mean().item() == pytest.approx(1, rel=1e-3)
    spread = latents.std(dim=0, correction=0)
    ratio = codec.pca.variances[0] / codec.pca.variances[5]
    assert (spread[0] / spread[5]).item() == pytest.approx(ratio ** ((1 - whitening) / 2), rel=1e-2)


def test_decoded_images_are_clipped(shards, tmp_path, workspace):
    for kind in FITTED:
        codec = fit_and_load(kind, shards, tmp_path / kind, workspace)
        noise = torch.randn(3, *codec.latent_shape, generator=torch.Generator().manual_seed(0))
        decoded = codec.decode(50 * noise)
        assert decoded.shape == (3, 4, 4, 1)
        assert decoded.min() >= 0 and decoded.max() <= 1
        if not kind.startswith("autoencoder"):
            assert decoded.min() == 0 and decoded.max() == 1


def test_images_of_another_shape_are_refused(shards, tmp_path, workspace):
    codec = fit_and_load("pixels", shards, tmp_path / "codec", workspace)
    with pytest.raises(ValueError, match="fitted on images of shape"):
        codec.encode(np.zeros((1, 5, 4, 1), dtype=np.uint8))


def test_more_components_than_pixels_are_refused(shards, tmp_path, workspace):
    with pytest.raises(ValueError, match="at most 16"):
        fit_and_load("pca", shards, tmp_path / "codec", workspace, components=17)


def test_unknown_codec_kind_is_refused(tmp_path):
    write_json(tmp_path / "codec.json", {"kind": "wavelets"})
    with pytest.raises(CorruptArtifact, match="wavelets"):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    "change", [{"whitening": "x"}, {"whitening": float("nan")}, {"image_shape": [4, 4]}, {"image_shape": [4, 4, 9]}]
)
def test_codec_with_foreign_values_is_refused(shards, tmp_path, workspace, change):
    fit_and_load("pca", shards, tmp_path / "codec", workspace)
    file = tmp_path / "codec" / "codec.json"
    write_json(file, read_json(file) | change)
    with pytest.raises(CorruptArtifact, match="does not hold a valid codec"):
        load_codec(tmp_path / "codec")
