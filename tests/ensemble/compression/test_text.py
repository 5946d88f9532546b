"""Compression stages of experts that read text: what works on captions works, the rest is refused in one sentence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace
from ensemble.analysis.diffusion_classifier import classify
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.acceleration.truncated_start import fit_draft
from ensemble.compression.common.calibration_data import calibration_batches, output_error
from ensemble.compression.distillation.config import (
    ConsistencyConfig,
    MeanFlowConfig,
    MMDConfig,
    SCMConfig,
    SiDConfig,
    SignConfig,
    SpeedUpNetConfig,
)
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.compression.distillation.mean_flow import train_mean_flow
from ensemble.compression.distillation.mmd import finetune_mmd
from ensemble.compression.distillation.scm import train_scm
from ensemble.compression.distillation.sid import distill_sid
from ensemble.compression.distillation.sign import train_sign
from ensemble.compression.distillation.speedup import train_speedup
from ensemble.compression.method import Clusters, StageError
from ensemble.config import ClassifierConfig, ExpertSamplesConfig
from ensemble.pipeline_folder import PipelineError
from ensemble.sampling.expert_samples import sample_expert_latents
from experts.conditions.captions import EncodedCaptions
from experts.conditions.null_text import get_null_text
from experts.config import TrainingConfig
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset, LatentError
from tests.ensemble.sampling.test_expert_samples import partition
from tests.ensemble.text_pipeline import SHAPE, assemble_text_pipeline

__all__ = ["partition"]
TRAINING = TrainingConfig(steps=2, batch_size=4)
COUNT = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compression")
    assemble_text_pipeline(root, num_classes=0)
    return root


@pytest.fixture(scope="module")
def expert(root):
    return Expert.load(root / "trained_0")


@pytest.fixture(scope="module")
def dataset(expert):
    """Give every sample a caption of one token."""
    null_text, generator = get_null_text(expert.model), torch.Generator().manual_seed(0)
    width, pooled_width = null_text.shape[1:]
    captions = EncodedCaptions(
        token_features=torch.randn(COUNT, width, generator=generator),
        first_token=torch.arange(COUNT + 1),
        pooled=torch.randn(COUNT, pooled_width, generator=generator),
        weight=torch.ones(COUNT),
        first_caption=torch.arange(COUNT + 1),
        null_text=null_text,
    )
    clean, none = torch.randn(COUNT, *SHAPE, generator=generator), torch.full((COUNT,), -1)
    return LatentDataset(clean=clean, class_id=none, cluster_id=0 * none, captions=captions)


@pytest.mark.parametrize(
    ("distill", "config"),
    [
        (distill_sid, SiDConfig(training=TRAINING)),
        (train_consistency, ConsistencyConfig(training=TRAINING)),
        (train_mean_flow, MeanFlowConfig(training=TRAINING, guidance=2)),
        (train_scm, SCMConfig(training=TRAINING, guidance=2)),
        (train_sign, SignConfig(training=TRAINING, guidance=2)),
        (train_speedup, SpeedUpNetConfig(training=TRAINING)),
    ],
)
def test_distilled_student_reads_text(distill, config, expert, dataset, tmp_path):
    student = distill(expert, dataset, config, Workspace.at(tmp_path)).network
    condition = dataset.condition(torch.arange(2))
    noised = torch.randn(1, *SHAPE).expand(2, *SHAPE)
    first, second = student.velocity(noised, torch.ones(2), condition)
    assert (first - second).abs().max() > 1e-5
    assert torch.equal(get_null_text(student.model).pooled, get_null_text(expert.model).pooled)


def test_calibration_sees_texts(expert, dataset):
    batches = calibration_batches(dataset, rows=8, seed=0, count=2)
    assert not batches[0].condition.is_null.all()
    assert output_error(expert.model, expert, batches) == 0


def test_methods_that_see_classes_alone_are_refused(expert, dataset, tmp_path):
    workspace = Workspace.at(tmp_path)
    with pytest.raises(StageError, match="texts are hardly ever equal; choose distill=sid"):
        finetune_mmd(expert, dataset, MMDConfig(training=TRAINING), workspace)
    with pytest.raises(StageError, match=r"sees classes and no text; choose accelerate\.draft=anchors"):
        fit_draft(expert, expert, dataset, TruncateConfig(draft="autoregressive"), workspace)


def test_latents_without_captions_are_refused(root, tmp_path):
    writer = ShardWriter(tmp_path / "cluster", 16)
    writer.add(Sample(key="0", image=np.zeros((4, 4, 1), np.uint8)))
    writer.close()
    data = Clusters(folders=[tmp_path / "cluster"], codec=root / "codec", labeled=True, reads_text=True)
    with pytest.raises(StageError, match="these latents have no captions"):
        data.load_latents(0, Workspace.at(tmp_path / "work"))
    unconditional = replace(data, labeled=False)
    assert len(unconditional.load_latents(0, Workspace.at(tmp_path / "work"))) == 1


def test_analyses_by_class_are_refused(root, partition, tmp_path):
    with pytest.raises(LatentError, match=r"set router\.data=real"):
        folders = {0: root / "trained_0"}
        sample_expert_latents(folders, partition, ExpertSamplesConfig(), tmp_path / "out", Workspace.at(tmp_path))
    labeled = assemble_text_pipeline(tmp_path, num_classes=2)
    with pytest.raises(PipelineError, match="trained on both together"):
        classify(labeled, partition, ClassifierConfig(), tmp_path)
