import json
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import (
    CorruptArtifact,
    Preempted,
    UnfinishedArtifact,
    Workspace,
    list_files,
    read_json,
    write_json,
)
from experts.architectures.residual_mlp import ResidualMLP
from experts.codecs.registry import fit_codec, load_codec
from experts.conditions.condition import Condition
from experts.config import CodecConfig, DiTConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW
from experts.expert import EARLY, Expert, train_expert
from experts.networks.class_settings import NetworkError
from experts.networks.registry import call_network
from experts.training.latent_dataset import LatentError

TRAINING = TrainingConfig(steps=12, batch_size=100, warmup_steps=2, log_every=5)
CONFIG = ExpertConfig(network=ResidualMLPConfig(width=16, depth=1), training=TRAINING)


@pytest.fixture
def codec(shards, tmp_path, workspace):
    fit_codec(CodecConfig(components=8), shards, tmp_path / "codec", workspace)
    return tmp_path / "codec"


def create_expert(prediction="velocity", noise_schedule=RECTIFIED_FLOW):
    torch.manual_seed(0)
    model = ResidualMLP(latent_shape=[4], num_classes=3, width=16, depth=1).eval()
    torch.nn.init.normal_(model.exit.weight)
    return Expert(
        model=model,
        prediction=prediction,
        noise_schedule=noise_schedule,
        latent_shape=(4,),
        num_classes=3,
        cluster_id=2,
    )


def inputs():
    return torch.randn(3, 4), torch.tensor([0.2, 0.5, 0.9]), Condition(torch.tensor([0, -1, 2]))


def test_velocity_on_own_schedule_is_the_network_output():
    expert, (noised, t, condition) = create_expert(noise_schedule=COSINE), inputs()
    predicted = call_network(expert.model, noised, t, condition)
    assert torch.equal(expert.velocity(noised, t, condition), predicted)
    assert torch.equal(expert.velocity(noised, t, condition, COSINE), predicted)
    assert not torch.allclose(expert.velocity(noised, t, condition, RECTIFIED_FLOW), predicted)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean"])
def test_loaded_expert_equals_saved_expert(prediction, tmp_path):
    expert, (noised, t, condition) = create_expert(prediction, COSINE), inputs()
    expert.save(tmp_path)
    loaded = Expert.load(tmp_path)
    assert torch.equal(
        loaded.velocity(noised, t, condition, RECTIFIED_FLOW), expert.velocity(noised, t, condition, RECTIFIED_FLOW)
    )
    for name in ("prediction", "noise_schedule", "latent_shape", "num_classes", "cluster_id"):
        assert getattr(loaded, name) == getattr(expert, name)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


def test_invalid_expert_folder_is_refused(tmp_path):
    with pytest.raises(UnfinishedArtifact, match=r"expert\.json"):
        Expert.load(tmp_path)
    create_expert().save(tmp_path)
    write_json(tmp_path / "expert.json", read_json(tmp_path / "expert.json") | {"noise_schedule": "spiral"})
    with pytest.raises(CorruptArtifact, match="spiral"):
        Expert.load(tmp_path)


def test_trained_expert_folder_is_complete(shards, codec, tmp_path, workspace):
    out = tmp_path / "expert"
    summary = train_expert(CONFIG, [shards], codec, out, workspace, cluster_id=1)
    assert {path.name for path in list_files(out)} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "expert.json",
        "metrics.jsonl",
        "training.json",
    }
    loaded = Expert.load(out)
    assert (loaded.num_classes, loaded.cluster_id, loaded.latent_shape) == (3, 1, (8,))
    assert (summary.images, summary.epochs) == (40, 30.0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert summary.final_loss == rows[-1]["loss"]
    linear = 64 * 128 + 128 * 128 + 128 * 48 + 8 * 16 + 2 * 16 * 16 + 16 * 8
    assert summary.flops == 3 * 2 * linear * 100 * 12


def test_early_checkpoint_is_the_average_at_its_step(shards, codec, tmp_path):
    """Kept through an interruption, and without any influence on the expert itself."""
    early = replace(CONFIG, training=replace(TRAINING, early_checkpoint=0.5, checkpoint_every=4))
    folders = {name: tmp_path / name for name in ("plain", "whole", "stopped")}
    train_expert(CONFIG, [shards], codec, folders["plain"], Workspace.at(tmp_path / "work_plain"))
    train_expert(early, [shards], codec, folders["whole"], Workspace.at(tmp_path / "work_whole"))
    workspace, asked = Workspace.at(tmp_path / "work_stopped"), iter([False] * 9 + [True])
    with pytest.raises(Preempted):
        train_expert(early, [shards], codec, folders["stopped"], replace(workspace, stopping=lambda: next(asked)))
    train_expert(early, [shards], codec, folders["stopped"], workspace)
    name = "diffusion_pytorch_model.safetensors"
    assert (folders["plain"] / name).read_bytes() == (folders["whole"] / name).read_bytes()
    for path in list_files(folders["whole"]):
        assert path.read_bytes() == (folders["stopped"] / path.relative_to(folders["whole"])).read_bytes()
    models = [Expert.load(folder).model for folder in (folders["whole"], folders["whole"] / EARLY)]
    assert any(not torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_training_is_byte_identical_in_another_folder(shards, codec, tmp_path):
    for name in ("a", "b"):
        train_expert(CONFIG, [shards], codec, tmp_path / name, Workspace.at(tmp_path / f"work_{name}"))
    for path in list_files(tmp_path / "a"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_class_beyond_num_classes_is_refused(shards, codec, tmp_path, workspace):
    with pytest.raises(LatentError, match="class 2, but there are only 2 classes"):
        train_expert(CONFIG, [shards], codec, tmp_path / "expert", workspace, num_classes=2)


def test_network_for_other_latents_is_refused(shards, codec, tmp_path, workspace):
    config = ExpertConfig(network=DiTConfig(), training=TRAINING)
    with pytest.raises(NetworkError, match="codec pixels"):
        train_expert(config, [shards], codec, tmp_path / "expert", workspace)


def test_expert_trains_on_pixels(shards, tmp_path, workspace):
    fit_codec(CodecConfig(kind="pixels"), shards, tmp_path / "codec", workspace)
    config = ExpertConfig(network=DiTConfig(heads=1, head_width=8, depth=1), training=TRAINING)
    train_expert(config, [shards], tmp_path / "codec", tmp_path / "expert", workspace)
    assert Expert.load(tmp_path / "expert").latent_shape == load_codec(tmp_path / "codec").latent_shape
