"""Two workers that keep parts of one network each (FSDP2, over gloo), started once, against one worker."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import distributed

from benchmarks.testbed import sharded_training
from benchmarks.testbed.backbones import TINY, build, gradients
from benchmarks.testbed.sharded_training import KILLED, CheckpointReader, kill_at_random, predict, start_workers
from ddm_core.artifacts import Preempted, Workspace, write_record
from ddm_core.files.checksums import checksum
from experts.config import ExpertConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.registry import build_network, call_network
from experts.training.checkpoint import STATE, TENSORS
from experts.training.held_out import measure_held_out
from experts.training.parallel.distributed import DataParallelGroup
from experts.training.parallel.sharding import shard_network, whole
from experts.training.parallel.tensor_file import DTYPES, write_tensors
from experts.training.trainer import Watch, fit
from tests.experts.training.parallel.test_distributed import are_equal, dataset, predictions, worker_workspace
from tests.experts.training.test_trainer import NETWORKS, stopping_at, velocity_loss

CONFIG = TrainingConfig(
    steps=12, batch_size=8, warmup_steps=3, log_every=4, checkpoint_every=5, held_out_every=4, parallel="fsdp"
)


def measuring(kind):
    """Return a watch that measures on three samples, so that one worker of two has fewer of them."""
    samples = dataset(NETWORKS[kind][1]).select(torch.arange(3))

    def measure(model):
        def velocity(noised, t, condition):
            return call_network(model, noised, t, condition)

        return measure_held_out(velocity, samples, RECTIFIED_FLOW, 5, torch.device("cpu"), DataParallelGroup.join())

    return Watch(measure=measure)


def train(kind, workspace, config=CONFIG):
    """Return the averaged parameters and the metrics rows."""
    torch.manual_seed(5)
    model = build_network(*NETWORKS[kind], 3)
    trained = fit(model, velocity_loss, dataset(NETWORKS[kind][1]), config, workspace, watch=measuring(kind))
    return trained.model.state_dict(), trained.rows


def scenario(rank, folder):
    """Train to the end; stop and resume; resume what one worker stopped."""
    for kind in ("residual_mlp", "dit"):
        tensors, rows = train(kind, worker_workspace(folder / kind, rank))
        torch.save((tensors, rows), folder / f"{kind}_{rank}.pt")
    with pytest.raises(Preempted):
        train("dit", stopping_at(6, folder / "stopped"))
    if rank == 0:
        shutil.copytree(folder / "stopped", folder / "for_one")
    torch.save(train("dit", Workspace.at(folder / "stopped")), folder / f"stopped_{rank}.pt")
    torch.save(train("dit", Workspace.at(folder / "of_one")), folder / f"of_one_{rank}.pt")


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "meeting"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield DataParallelGroup()
    distributed.destroy_process_group()


@pytest.mark.parametrize("case", TINY)
def test_every_class_has_the_same_gradients_sharded(case, group_of_one):
    expected, model = gradients(build(case), case), build(case)
    shard_network(model, group_of_one)
    for name, gradient in gradients(model, case).items():
        assert (gradient is None) == (expected[name] is None)
        if gradient is not None:
            torch.testing.assert_close(whole(gradient), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", [{"optimizer": "muon"}, {"autocast": "float16"}, {"ema_snapshots": 2}])
def test_what_needs_whole_tensors_is_refused_before_it_starts(setting):
    with pytest.raises(ValueError, match=r"needs whole ones.*training\.parallel=ddp"):
        replace(CONFIG, **setting)
    with pytest.raises(ValueError, match=r"align_weight=0"):
        ExpertConfig(training=CONFIG, align_weight=0.5)


@pytest.mark.slow
def test_sharded_training_is_that_of_one_worker(tmp_path):
    with pytest.raises(Preempted):
        train("dit", stopping_at(6, tmp_path / "of_one"))
    workers = start_workers(tmp_path, scenario)
    alone = {kind: train(kind, Workspace.at(tmp_path / f"{kind}_alone")) for kind in ("residual_mlp", "dit")}
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]

    def result(name, rank=0):
        return torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True)

    for kind, (tensors, rows) in alone.items():
        sharded, sharded_rows = result(kind)
        assert_close(kind, sharded, tensors)
        assert are_equal(sharded, result(kind, 1)[0]), "all workers hold the same average"
        for ours, theirs in zip(sharded_rows, rows, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert are_equal(result("stopped")[0], result("dit")[0]), "two after two, bit for bit"
    assert_close("dit", result("of_one")[0], alone["dit"][0])
    assert_close("dit", train("dit", Workspace.at(tmp_path / "for_one"))[0], alone["dit"][0])


def assert_close(kind, ours, theirs):
    """Compare predictions: noise alone moves a bias that the next layer cancels."""
    ours, theirs = (predictions(kind, {f"average.{name}": x for name, x in side.items()}) for side in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=5))
def test_tensors_written_one_by_one_are_read_by_safetensors(kinds):
    tensors = {f"t{i}": (torch.rand(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        write_tensors(path, tensors, tensors.items())
        assert are_equal(load_file(path), tensors)


def test_reader_counts_a_torn_checkpoint_and_no_deleted_one(tmp_path):
    reader = CheckpointReader(tmp_path / "checkpoints")
    assert reader.look() == 0
    tensors = {"weight": torch.ones(3)}
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_tensors(folder / TENSORS, tensors, tensors.items())
        write_record(folder / STATE, {"sha256": checksum(folder / TENSORS)})
        if step == 1:
            assert reader.look() == 1 == len(reader.read)
            (folder / STATE).unlink()
        if step == 3:
            (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
        assert reader.look() == step
    assert (len(reader.read), reader.torn) == (3, {"step-00000003"})


@pytest.mark.integration
def test_workers_killed_at_random_leave_whole_checkpoints(tmp_path):
    found = kill_at_random(tmp_path, 20)
    assert found.kills == 20 and found.read >= 200 and found.torn == 0
    assert found.ended == len(found.left) > 0
    killed = torch.load(tmp_path / "killed_0.pt", weights_only=True)
    alone = sharded_training.train(Workspace.at(tmp_path / "whole"), KILLED)
    torch.testing.assert_close(predict(killed), predict(alone), rtol=1e-5, atol=1e-5)
