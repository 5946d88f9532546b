"""Both ensembles are measured as they are served: conditions, guidance, solver, sizes of requests, all calls."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace, read_json
from ensemble.compression.acceleration.config import BaseFirstConfig
from ensemble.compression.config import CompressionConfig, TimingConfig, WeightOnlyConfig
from ensemble.compression.handover import split_by_time
from ensemble.compression.measurement import RECORDS, compare, model_bytes, time_both
from ensemble.compression.method import Clusters
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import EnsemblePipeline
from experts.codec import PixelCodec
from experts.config import DiTConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from experts.training.memory import LiveBytes

GUIDED = SamplingConfig(solver="euler", steps=19, guidance_scale=3)


def test_records_and_codec_do_not_count(tmp_path):
    for part in ("expert_0", "router", "codec"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "diffusion_pytorch_model.safetensors").write_bytes(bytes(100))
    before = model_bytes(tmp_path)
    for name in RECORDS:
        (tmp_path / "expert_0" / name).write_text("17.25 s")
    assert model_bytes(tmp_path) == before == 200


@pytest.fixture
def expert():
    torch.manual_seed(0)
    model = build_network(DiTConfig(patch_size=2, heads=2, head_width=16, depth=2), (1, 8, 8), 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=3,
        cluster_id=0,
    )


@pytest.fixture
def data(tmp_path):
    writer = ShardWriter(tmp_path / "0", 16, class_names=("a", "b", "c"))
    for number in range(12):
        image = np.full((8, 8, 1), number, np.uint8)
        writer.add(Sample(key=str(number), image=image, label=number % 3))
    writer.close()
    return Clusters(folders=[tmp_path / "0"], codec=tmp_path / "pipeline" / "codec", labeled=True)


def save(expert, folder):
    ensemble = Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW)
    EnsemblePipeline(ensemble=ensemble, codec=PixelCodec(image_shape=(8, 8, 1)), num_classes=3).save_pretrained(folder)
    return folder


@pytest.fixture
def folders(expert, tmp_path):
    """The original, and base-first students of two steps."""
    student = replace(expert, few_step=FewStepSchedule.uniform(2, "renoise", is_distilled=True))
    combined = split_by_time(0, student, expert, BaseFirstConfig())
    return save(expert, tmp_path / "pipeline"), save(combined, tmp_path / "small")


def compared(folders, data, tmp_path, sampling=GUIDED, **settings):
    config = CompressionConfig(method=WeightOnlyConfig(), sampling=sampling, num_samples=6, **settings)
    return compare(("base_first",), 1, folders, data, config, Workspace.at(tmp_path / "work"))


def test_guidance_counts_both_branches_of_the_original(folders, data, tmp_path):
    report = compared(folders, data, tmp_path)
    assert report.flops_after / report.flops_before == pytest.approx(2 / 38, rel=1e-3)
    assert report.guidance_scale == 3
    plain = compared(folders, data, tmp_path, replace(GUIDED, guidance_scale=1))
    assert plain.flops_after / plain.flops_before == pytest.approx(2 / 19, rel=1e-3)
    assert plain.relative_l2 != report.relative_l2


def test_experts_without_classes_are_compared_without_guidance(folders, data, tmp_path):
    report = compared(folders, replace(data, labeled=False), tmp_path)
    assert report.guidance_scale == 1
    assert report.flops_after / report.flops_before == pytest.approx(2 / 19, rel=1e-3)


def test_requests_of_every_size_are_counted(folders, data, tmp_path):
    report = compared(folders, data, tmp_path, batch_sizes=(1, 4, 64))
    assert [cost.batch_size for cost in report.served] == [1, 4, 6]
    assert [cost.flops_before for cost in report.served] == pytest.approx([report.flops_before] * 3)
    memory = [cost.memory_before for cost in report.served]
    assert model_bytes(folders[0]) < memory[0] < memory[1] < memory[2]
    assert [cost.memory_after > cost.memory_before for cost in report.served] == [True] * 3
    assert compared(folders, data, tmp_path, batch_sizes=(1, 4, 64)) == report


def test_counted_calls_equal_the_network_s_own_count(folders, data, tmp_path):
    report = compared(folders, data, tmp_path)
    costs = RowFlops.measure(EnsemblePipeline.from_pretrained(folders[0]))
    assert report.flops_before == pytest.approx(38 * costs.experts[0])


def test_timing_reports_every_size(folders, data, tmp_path):
    config = TimingConfig(sampling=replace(GUIDED, steps=2), batch_sizes=(1, 3), turns=2)
    flops = time_both(config, folders[1], folders[0], data, tmp_path, Workspace.at(tmp_path / "work"))
    timing = read_json(tmp_path / "timing.json")
    assert flops > 0 and [row["batch_size"] for row in timing["served"]] == [1, 3]
    assert timing["ratio"] == timing["served"][-1]["ratio"]


def test_live_bytes_are_those_of_tensors_alive_at_once():
    kept = torch.ones(1000)
    with LiveBytes([kept]) as memory:
        first = kept + 1
        second = first * 2
        del first
        third = second.reshape(10, 100) - 1
    assert memory.peak == 3 * kept.nbytes and memory.live == 3 * kept.nbytes
    del second, third
    assert memory.live == kept.nbytes
