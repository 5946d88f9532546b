"""Folders of strangers: what is refused, before memory is allocated."""

import json
import struct
import tracemalloc

import pytest
import torch

from ddm_core.artifacts import ArtifactError, read_json, write_json
from ensemble.pipeline import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline

WEIGHTS = "expert_0/diffusion_pytorch_model.safetensors"


def add_pickle(folder):
    torch.save({}, folder / "expert_0" / "pytorch_model.bin")


def add_code(folder):
    (folder / "pipeline.py").write_text("raise SystemExit('this code ran')")


def name_remote_class(folder):
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"_class_name": ["pipeline", "DDMPipeline"]})


def add_link(folder):
    (folder / "codec" / "codec.json").unlink()
    (folder / "codec" / "codec.json").symlink_to("/etc/hostname")


def claim_huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10**9) + b"{" + b" " * 100)


def claim_huge_shapes(folder):
    config = read_json(folder / "expert_0" / "config.json")
    write_json(folder / "expert_0" / "config.json", config | {"num_layers": 400, "attention_head_dim": 4096})


def claim_huge_tensor(folder):
    header = {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    content = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content)


def name_pickle_in_index(folder):
    (folder / WEIGHTS).rename(folder / "expert_0" / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"pos_embed.proj.weight": "../../evil.bin"}}
    write_json(folder / "expert_0" / "diffusion_pytorch_model.safetensors.index.json", index)


def name_other_scheduler(folder):
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "os.system"})


CHANGES = [
    add_pickle,
    add_code,
    name_remote_class,
    add_link,
    claim_huge_header,
    claim_huge_shapes,
    claim_huge_tensor,
    name_pickle_in_index,
    name_other_scheduler,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_hostile_folder_is_refused_without_memory(change, folder):
    change(folder)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError) as error:
            EnsembleDiffusionPipeline.from_pretrained(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "Traceback" not in str(error.value)


def test_message_names_the_file_and_the_way_out(folder):
    add_pickle(folder)
    with pytest.raises(PipelineError, match=r"expert_0/pytorch_model\.bin.*convert it to safetensors"):
        EnsembleDiffusionPipeline.from_pretrained(folder)
