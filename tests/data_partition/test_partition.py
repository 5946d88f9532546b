import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_partition import assignment as clusters
from data_partition.config import PartitionConfig
from data_partition.errors import EmptyCluster, FeaturesMismatch, TooFewSamples
from data_partition.features.extract import extract_features
from data_partition.partition import Partition, evenness, load_partition, make_partition
from data_partition.shards.shards import read_batches, read_index, read_samples
from ddm_core.artifacts import Preempted, Workspace
from tests.data_partition.conftest import read_files

CONFIG = PartitionConfig(num_experts=3, components=16, iterations=8)


@pytest.fixture(scope="session")
def features(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    extract_features(CONFIG, digits, folder / "out", Workspace.at(folder / "workspace"))
    return folder / "out"


@pytest.fixture(scope="session")
def partition_folder(digits: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partition")
    make_partition(CONFIG, digits, features, folder / "out", Workspace.at(folder / "workspace"))
    return folder / "out"


def test_table_shards_and_counts_agree(digits: Path, partition_folder: Path):
    with (partition_folder / "assignment.csv").open() as file:
        table = {row["key"]: int(row["cluster_id"]) for row in csv.DictReader(file)}
    partition = Partition.load(partition_folder)
    assert len(table) == 600 == partition.counts.sum()
    for cluster_id in range(3):
        keys = [sample.key for sample in read_samples(partition_folder / "clusters" / str(cluster_id))]
        assert keys == [key for key, assigned in table.items() if assigned == cluster_id]
        assert len(keys) == partition.counts[cluster_id]
    assert partition.class_counts is not None
    np.testing.assert_array_equal(partition.class_counts.sum(axis=0), partition.counts)
    assert read_index(partition_folder / "clusters" / "0").class_names == read_index(digits / "train").class_names


def test_assign_images_reproduces_the_partition(partition_folder: Path):
    partition = load_partition(partition_folder)
    for part in ("clusters", "holdout"):
        for cluster_id in range(3):
            for batch in read_batches(partition_folder / part / str(cluster_id), 256):
                assert (partition.assign_images(batch.images) == cluster_id).all()


def test_balance_report_matches_partition(digits: Path, partition_folder: Path):
    balance = json.loads((partition_folder / "balance.json").read_text())
    assert balance["counts"] == Partition.load(partition_folder).counts.tolist()
    assert sum(balance["holdout_counts"]) == read_index(digits / "holdout").count
    assert balance["smallest_over_mean"] > 0.9
    assert balance["largest_over_mean"] < 1.1
    assert sum(balance["shares"]) == pytest.approx(1)
    assert balance["num_fine"] == 30


def test_clusters_written_in_groups_are_identical(
    digits: Path,
    features: Path,
    partition_folder: Path,
    tmp_path: Path,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(clusters, "OPEN_TARS", 2)
    make_partition(CONFIG, digits, features, tmp_path / "out", workspace)
    assert read_files(tmp_path / "out") == read_files(partition_folder)


def test_assign_images_without_extractor_raises(digits: Path, features: Path, partition_folder: Path):
    partition = dataclasses.replace(Partition.load(partition_folder), class_counts=None)
    assert partition.class_counts is None
    with pytest.raises(FeaturesMismatch, match="no extractor"):
        partition.assign_images(next(read_batches(digits / "train", 2)).images)


def test_single_expert_gets_all_samples(digits: Path, features: Path, tmp_path: Path, workspace: Workspace):
    config = dataclasses.replace(CONFIG, num_experts=1)
    summary = make_partition(config, digits, features, tmp_path, workspace)
    assert summary.counts == (600,)
    assert summary.flops > 0


def test_more_experts_than_samples_raises(digits: Path, features: Path, tmp_path: Path, workspace: Workspace):
    with pytest.raises(TooFewSamples, match="600 training samples"):
        make_partition(dataclasses.replace(CONFIG, num_experts=601), digits, features, tmp_path, workspace)


def test_features_of_other_samples_raise(digits: Path, features: Path, tmp_path: Path, workspace: Workspace):
    copied = tmp_path / "features"
    copied.mkdir()
    (copied / "features.npy").write_bytes((features / "features.npy").read_bytes())
    (copied / "keys.txt").write_text((features / "keys.txt").read_text().replace("digits-0", "letters-0"))
    with pytest.raises(FeaturesMismatch, match="row 0 of the features belongs to 'letters-0"):
        make_partition(CONFIG, digits, copied, tmp_path / "out", workspace)
    np.save(copied / "features.npy", np.zeros((5, 3), dtype=np.float32))
    with pytest.raises(FeaturesMismatch, match="600 samples"):
        make_partition(CONFIG, digits, copied, tmp_path / "out", workspace)
    (copied / "features.npy").write_bytes(b"cut")
    with pytest.raises(FeaturesMismatch, match="cannot be read"):
        make_partition(CONFIG, digits, copied, tmp_path / "out", workspace)


def test_make_partition_stops_on_request(digits: Path, features: Path, tmp_path: Path, workspace: Workspace):
    (workspace.scratch / "stop").touch()
    with pytest.raises(Preempted):
        make_partition(CONFIG, digits, features, tmp_path, workspace)


def test_evenness_matches_examples():
    assert evenness(np.array([5, 5, 5])) == pytest.approx(1)
    assert evenness(np.array([7])) == 1
    assert evenness(np.array([1, 3])) == pytest.approx(0.8112781244591328)


@pytest.fixture(scope="session")
def partition_by(digits: Path, features: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("partitions")

    def make_or_reuse(**changes) -> Path:
        config = dataclasses.replace(CONFIG, **changes)
        out = folder / "-".join(map(str, changes.values()))
        if not out.exists():
            make_partition(config, digits, features, out, Workspace.at(folder / "workspace" / out.name))
        return out

    return make_or_reuse


@pytest.mark.parametrize("by", ["labels", "random"])
@pytest.mark.parametrize("part", ["clusters", "holdout"])
def test_every_strategy_puts_each_sample_in_one_cluster(digits: Path, partition_by, by: str, part: str):
    source = "train" if part == "clusters" else "holdout"
    all_keys = sorted(sample.key for sample in read_samples(digits / source))
    folders = [partition_by(by=by) / part / str(cluster_id) for cluster_id in range(3)]
    assert sorted(sample.key for folder in folders for sample in read_samples(folder)) == all_keys


@pytest.mark.parametrize("part", ["clusters", "holdout"])
def test_partition_by_labels_keeps_each_class_together(partition_by, part: str):
    out = partition_by(by="labels", num_experts=4)
    labels = [{sample.label for sample in read_samples(out / part / str(cluster_id))} for cluster_id in range(4)]
    assert sum(map(len, labels)) == len(set.union(*labels)) == 10


def test_partition_by_labels_with_one_cluster_per_class(partition_by):
    partition = Partition.load(partition_by(by="labels", num_experts=10))
    assert np.count_nonzero(partition.class_counts) == 10


def test_random_partition_mixes_classes_and_depends_on_seed(partition_by):
    folders = [partition_by(by="random", seed=seed) for seed in (0, 1)]
    counts = Partition.load(folders[0]).class_counts
    expected = counts.sum(1, keepdims=True) / 3
    assert (np.square(counts - expected) / expected).sum() < 45  # chi squared, 20 degrees of freedom: p = .001
    keys = [{sample.key for sample in read_samples(out / "clusters" / "0")} for out in folders]
    assert 0.2 < len(keys[0] & keys[1]) / len(keys[0]) < 0.47


def test_generated_images_are_assigned_like_holdout(digits: Path, partition_folder: Path, partition_by):
    for out in (partition_folder, partition_by(by="labels")):
        partition, balance = load_partition(out), json.loads((out / "balance.json").read_text())
        ids = [partition.assign_images(batch.images) for batch in read_batches(digits / "holdout", 256)]
        assert np.bincount(np.concatenate(ids), minlength=3).tolist() == balance["holdout_looks"]
    assert (
        json.loads((partition_folder / "balance.json").read_text())["holdout_counts"]
        == read_balance(partition_folder)["holdout_looks"]
    )


def read_balance(out: Path) -> dict:
    return json.loads((out / "balance.json").read_text())


def test_more_clusters_than_classes_raises(partition_by):
    with pytest.raises(EmptyCluster, match="10 classes cannot be 11 clusters"):
        partition_by(by="labels", num_experts=11)
