"""A pipeline as a classifier: output and errors."""

from dataclasses import replace

import numpy as np
import pytest

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import read_json
from ensemble.analysis.diffusion_classifier import classify
from ensemble.config import ClassifierConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import assemble
from ensemble.pipeline_folder import PipelineError
from tests.ensemble.test_pipeline import make_expert, parts, put_together

__all__ = ["parts"]
CONFIG = ClassifierConfig(images=12, noises_per_image=2, batch_size=8)


def write_holdouts(folder, labels):
    """Three clusters of seven random images each."""
    draws = np.random.default_rng(0)
    for k in range(3):
        writer = ShardWriter(folder / "holdout" / str(k), 16, ("a", "b"))
        for number in range(7):
            image = draws.integers(0, 256, (4, 4, 1), dtype=np.uint8)
            writer.add(Sample(key=f"{k}-{number}", image=image, label=number % 2 if labels else -1))
        writer.close()
    return folder


def test_classify_uses_equal_images_of_every_cluster(parts, tmp_path):
    pipeline, reports = put_together(parts), []
    partition = write_holdouts(tmp_path / "partition", labels=True)
    flops = classify(pipeline, partition, CONFIG, tmp_path, lambda done, total: reports.append((done, total)))
    written = read_json(tmp_path / "classify.json")
    assert written["images"] == [4, 4, 4] and written["chance"] == 0.5
    assert written["models"] == ["ensemble", "expert_0", "expert_1", "expert_2"]
    rows, costs = 12 * 2 * CONFIG.noises_per_image, RowFlops.measure(pipeline)
    assert reports[-1] == (rows, rows)
    assert flops == rows * (sum(costs.experts.values()) + costs.router)


def test_classify_with_elimination_evaluates_fewer_rows(parts, tmp_path):
    pipeline, partition = put_together(parts), write_holdouts(tmp_path / "partition", labels=True)
    config = replace(CONFIG, noises_per_image=16)
    full = classify(pipeline, partition, config, tmp_path)
    assert classify(pipeline, partition, replace(config, elimination=0.01), tmp_path) < full


def test_classify_with_unconditional_experts_raises(parts, tmp_path):
    alone = assemble({0: make_expert(tmp_path / "e", 0, num_classes=0)}, None, parts / "codec", tmp_path / "alone")
    with pytest.raises(PipelineError, match="trained with classes, and these have 0; use a data set with classes"):
        classify(alone, write_holdouts(tmp_path / "partition", labels=True), CONFIG, tmp_path)


def test_classify_without_labeled_images_raises(parts, tmp_path):
    with pytest.raises(PipelineError, match="held-out images with a class, and none has one"):
        classify(put_together(parts), write_holdouts(tmp_path / "partition", labels=False), CONFIG, tmp_path)
