"""Features of vision networks of transformers, tiny and of random weights, from a folder."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError

from data_partition.config import PartitionConfig
from data_partition.errors import UnknownExtractor
from data_partition.features.extract import extract_features, load_extractor
from data_partition.shards.shards import read_batches
from ddm_core.artifacts import Workspace

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 32, "max_position_embeddings": 8}
NETWORKS = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **IMAGE)),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, **IMAGE)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config={**SIZES, **IMAGE}, projection_dim=8)
    ),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TEXT, vision_config={**SIZES, **IMAGE})
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_extractor_is_the_network_of_the_folder(digits, tmp_path, name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    network.save_pretrained(tmp_path / "network")
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "network" / "preprocessor_config.json").write_text(json.dumps(settings))
    config = PartitionConfig(features="transformers", features_path=str(tmp_path / "network"))
    summary = extract_features(config, digits, tmp_path / "features", Workspace.at(tmp_path / "work"))
    assert summary.dimension == 16 and summary.flops > 0
    shutil.rmtree(tmp_path / "network")
    extractor = load_extractor(tmp_path / "features" / "extractor")
    batch = next(read_batches(digits / "train", config.batch_size))
    found = np.load(tmp_path / "features" / "features.npy")
    assert np.array_equal(found[: len(batch.keys)], extractor(batch.images))
    pixels = torch.from_numpy(batch.images[:3]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255
    inputs = torch.nn.functional.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        pooled = getattr(network, "vision_model", network)(pixel_values=(inputs - 0.5) / 0.25).pooler_output
    assert np.allclose(found[:3], torch.nn.functional.normalize(pooled, dim=1), atol=1e-5)


def test_what_is_no_vision_network_is_refused(digits, tmp_path):
    config = PartitionConfig(features="transformers", features_path=str(tmp_path))
    with pytest.raises(UnknownExtractor, match="does not hold a vision network"):
        extract_features(config, digits, tmp_path / "features", Workspace.at(tmp_path / "work"))
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(UnknownExtractor, match="holds a BertModel, which reads no images"):
        extract_features(config, digits, tmp_path / "features", Workspace.at(tmp_path / "work"))
    with pytest.raises(ValidationError, match="needs partition.features_path"):
        PartitionConfig(features="transformers")
