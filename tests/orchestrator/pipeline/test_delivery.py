"""`ddm extend`: later data join the clusters of a run, whose experts train on; nothing of before runs again."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.testbed.tiny_run import TINY
from data_partition.partition import Partition, load_partition
from data_partition.shards.shards import read_index, read_samples
from ddm_core.artifacts import list_files, verify
from experts.training.latents.folder import read_latents
from orchestrator.cli.app import app
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder

SETTINGS = (
    *(setting for setting in TINY if setting != "data.limit=160"),
    *("data=image_folder", "data.image_size=8", "data.channels=1", "data.shard_samples=16", "data.holdout=0.3"),
    *("scores.spaces=[pixels]", "partition.num_experts=2", "partition.num_fine=4", "budget_minutes=0"),
    *("compute=inline", "baselines=[monolith]"),
)


def draw(folder, numbers, classes=("dark", "light")):
    draws = np.random.default_rng(min(numbers))
    for number in numbers:
        name = classes[number % len(classes)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 100, (8, 8)) + 150 * (name != "dark")
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03d}.png")
    return folder


def ddm(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output + str(result.exception or "")


def artifacts(run):
    config = run.load_config()
    return {stage.name: run.artifact(stage) for stage in build_graph(config)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "by", ["features", *(pytest.param(by, marks=pytest.mark.integration) for by in ("labels", "random"))]
)
def test_a_delivery_joins_the_clusters(tmp_path, by):
    run = RunFolder(tmp_path / "run")
    first = draw(tmp_path / "first", range(80))
    code, output = ddm("run", *SETTINGS, f"data.path={first}", f"folder={run.root}", f"partition.by={by}")
    assert code == 0, output
    before = artifacts(run)
    files = {path: path.stat().st_mtime_ns for path in list_files(run.root / "artifacts")}
    later = draw(tmp_path / "later", range(100, 140), ("light",))
    code, output = ddm("extend", run.root, later, "--steps", 4)
    assert code == 0, output
    assert files.items() <= {path: path.stat().st_mtime_ns for path in list_files(run.root / "artifacts")}.items()
    after = artifacts(run)
    renamed = {"before_1_partition": "partition"} | {f"before_1_expert_{k}": f"expert_{k}" for k in range(2)}
    for name in (*renamed, "dataset", "features", "latents", "codec", "monolith"):
        assert after[name] == before[renamed.get(name, name)]
    for folder in after.values():
        verify(folder)
    check_partition(before["partition"], after, by)
    for k in range(2):
        assert after[f"expert_{k}"] != before[f"expert_{k}"]
        assert (after[f"expert_{k}"] / "training.json").read_text().count('"steps": 4')
    assert ddm("extend", run.root, later, "--steps", 4)[1].count("nothing to do") == 1
    if by == "labels":
        check_second_delivery(run, tmp_path)
    if by == "features":
        code, output = ddm("extend", run.root, draw(tmp_path / "odd", range(200, 220), ("blue",)), "--steps", 4)
        assert code and "has the class 'blue'" in output and "dark, light" in output
        check_refused_deliveries(run, tmp_path)


def check_refused_deliveries(run, folder):
    """Extend a run by what is not there and by what cannot be read: the run stays as it was."""
    before = run.load_config()
    code, output = ddm("extend", run.root, folder / "nothing")
    assert code and "later data (ddm extend)" in output and "is not a folder" in output
    broken = folder / "broken" / "dark"
    broken.mkdir(parents=True)
    for number in range(3):
        (broken / f"{number}.png").write_bytes(b"no image")
    code, output = ddm("extend", run.root, broken.parent)
    assert code and "dataset_2" in output
    assert run.load_config() == before
    code, output = ddm("resume", run.root)
    assert code == 0 and "nothing to do" in output, output


def check_partition(earlier, after, by, labels=frozenset({1})):
    """Compare a partition with the one before it and with the samples that were added."""
    old, new, delivered = Partition.load(earlier), load_partition(after["partition"]), after["dataset_1"] / "train"
    assert np.array_equal(old.fine_centroids, new.fine_centroids)
    assert new.counts.sum() == old.counts.sum() + read_index(delivered).count
    with (after["partition"] / "assignment.csv").open() as file:
        table = {row["key"]: int(row["cluster_id"]) for row in csv.DictReader(file)}
    assert len(table) == new.counts.sum() and Counter(table.values()) == Counter(dict(enumerate(new.counts.tolist())))
    added = list(read_samples(delivered))
    assert {sample.label for sample in added} == labels, "a class has the number that the run gave it"
    if by == "features":
        expected = new.assign_images(np.stack([sample.image for sample in added]))
        assert [table[sample.key] for sample in added] == expected.tolist()
    if by == "labels":
        assert len({table[sample.key] for sample in added}) == len(labels)
    for k, count in enumerate(new.counts.tolist()):
        clusters, latents = after["partition"] / "clusters" / str(k), after["partition"] / "latents" / str(k)
        keys = [sample.key for sample in read_samples(clusters)]
        assert len(keys) == count == len(read_latents(latents))
        assert {table[key] for key in keys} <= {k}
        old_keys = [sample.key for sample in read_samples(earlier / "clusters" / str(k))]
        assert keys[: len(old_keys)] == old_keys
        held_out = read_index(after["partition"] / "holdout" / str(k)).count
        assert held_out == len(read_latents(after["partition"] / "holdout_latents" / str(k)))


def check_second_delivery(run, folder):
    """Extend a run again, and look at what a user looks at then."""
    before = artifacts(run)
    code, output = ddm("extend", run.root, draw(folder / "last", range(300, 330)))
    assert code == 0, output
    after = artifacts(run)
    assert after["before_2_expert_0"] == before["expert_0"] and after["before_2_partition"] == before["partition"]
    assert after["before_1_expert_0"] == before["before_1_expert_0"]
    check_partition(before["partition"], after | {"dataset_1": after["dataset_2"]}, "labels", {0, 1})
    code, output = ddm("status", run.root)
    assert code == 0 and "before_2_expert_1" in output and "dataset_2" in output
    code, output = ddm("sample", run.root, "--seeds", "0-3", "--out", folder / "images.png")
    assert code == 0 and (folder / "images.png").is_file(), output
