"""Patches as latents: a closed form of the round trip, networks that accept them, files that do not fit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from experts.codecs.patch_pca import cut_patches, fit_patch_pca_codec
from experts.codecs.registry import fit_codec, load_codec
from experts.config import CodecConfig, DiTConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.errors import CodecError
from experts.expert import Expert, train_expert
from experts.networks.latent_shapes import latent_shape_of

CONFIG = CodecConfig(kind="patch_pca", patch_size=2, latent_channels=3)


@pytest.fixture
def color_shards(tmp_path):
    """30 images of 8 x 12 pixels in color."""
    writer, draws = ShardWriter(tmp_path / "color"), np.random.default_rng(0)
    for number in range(30):
        writer.add(Sample(key=f"{number:02d}", image=draws.integers(0, 256, (8, 12, 3)).astype(np.uint8)))
    writer.close()
    return tmp_path / "color"


@settings(max_examples=20)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.integers(1, 5), channels=st.sampled_from([1, 3]))
def test_patches_are_the_squares_of_an_image(rows, columns, side, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, rows * side, columns * side, channels)).astype(np.uint8)
    patches = cut_patches(images, side).reshape(2, rows, columns, side, side, channels)
    for row in range(rows):
        for column in range(columns):
            square = images[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert np.array_equal(patches[:, row, column], square)


def test_decoded_patch_is_its_projection_on_the_components(color_shards, tmp_path):
    codec = fit_patch_pca_codec(CONFIG, color_shards)
    image = np.zeros((1, 8, 12, 3), np.uint8)
    image[0, 2:4, 6:8] = 200
    latents = codec.encode(image)
    assert latents.shape == (1, 3, 4, 6) == (1, *codec.latent_shape)
    pca, black, gray = codec.patches.pca, np.zeros(12), np.full(12, 200 / 255)
    for patch, (row, column) in ((black, (0, 0)), (gray, (1, 3))):
        code = pca.components @ (patch - pca.mean)
        torch.testing.assert_close(latents[0, :, row, column], torch.from_numpy(code).float() / codec.patches.scale)
        expected = (pca.mean + code @ pca.components).clip(0, 1).reshape(2, 2, 3)
        decoded = codec.decode(latents)[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_allclose(decoded.numpy(), expected, atol=1e-5)


def test_all_components_keep_every_image(color_shards):
    codec = fit_patch_pca_codec(CodecConfig(kind="patch_pca", patch_size=4, latent_channels=48), color_shards)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 12, 3)).astype(np.uint8)
    decoded = codec.decode(codec.encode(images)).mul(255).round().numpy()
    assert np.array_equal(decoded, images)


@pytest.mark.parametrize(
    "network", [ResidualMLPConfig(width=8, depth=1), UNetConfig(channels=(8,)), DiTConfig(depth=1)]
)
def test_every_network_trains_on_patches(network, shards, tmp_path, workspace):
    fit_codec(CONFIG, shards, tmp_path / "codec", workspace)
    config = ExpertConfig(network=network, training=TrainingConfig(steps=2, batch_size=8, warmup_steps=1))
    train_expert(config, [shards], tmp_path / "codec", tmp_path / "expert", workspace, cluster_id=0)
    shape = latent_shape_of(CONFIG, 4, 1)
    assert Expert.load(tmp_path / "expert").latent_shape == shape == load_codec(tmp_path / "codec").latent_shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "must divide the side of the images, 4; set it to 1"),
        ({"latent_channels": 5}, "has 4 princ"),
    ],
)
def test_patches_that_do_not_fit_are_refused(change, message, shards, tmp_path, workspace):
    fields = {"patch_size": 2, "latent_channels": 3} | change
    with pytest.raises(CodecError, match=message):
        fit_codec(CodecConfig(kind="patch_pca", **fields), shards, tmp_path / "codec", workspace)


@pytest.mark.parametrize(
    "change", [{"patch_size": 3}, {"patch_size": 1}, {"image_shape": [4, 4, 3]}, {"patch_size": 0}]
)
def test_files_that_disagree_are_refused(change, shards, tmp_path):
    fit_codec(CONFIG, shards, tmp_path / "codec", Workspace.at(tmp_path / "work"))
    file = tmp_path / "codec" / "codec.json"
    write_json(file, read_json(file) | change)
    with pytest.raises(CorruptArtifact, match="does not hold a valid codec"):
        load_codec(tmp_path / "codec")
