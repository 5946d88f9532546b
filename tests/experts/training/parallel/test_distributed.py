"""Three workers, started once by torch.distributed, run all scenarios in sequence."""

import json
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import distributed

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Preempted, Workspace, list_files
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.conditions.text_encoder import TextEncoder
from experts.config import TextConfig, TrainingConfig
from experts.networks.registry import build_network, call_network
from experts.training.checkpoint import CheckpointError
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.encode import encode_dataset
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.latents.training_set import encode_latents
from experts.training.parallel.distributed import DataParallelGroup, GroupError, WorkerLost
from experts.training.trainer import TrainingDiverged, fit
from tests.experts.training.test_trainer import NETWORKS, Killed, killed_at, stopping_at, velocity_loss
from tests.text_encoders import save_tiny_encoder

SIZE = 3
TRAINING = TrainingConfig(steps=15, batch_size=9, warmup_steps=3, log_every=4, checkpoint_every=5)


def dataset(shape):
    """Return the data set of every worker."""
    generator = torch.Generator().manual_seed(0)
    return LatentDataset(
        clean=torch.randn(50, *shape, generator=generator),
        class_id=torch.arange(50) % 3,
        cluster_id=torch.zeros(50, dtype=torch.int64),
    )


def trained(kind, workspace, config=TRAINING, loss=velocity_loss):
    """Return averaged and last parameters in one dictionary, and the metrics rows."""
    torch.manual_seed(5)
    model = build_network(*NETWORKS[kind], 3)
    trained_result = fit(model, loss, dataset(NETWORKS[kind][1]), config, workspace)
    averaged = {f"average.{name}": value for name, value in trained_result.model.state_dict().items()}
    return averaged | model.state_dict(), trained_result.rows


def outcome_of(work):
    """Return how the work outcome_of, as text."""
    try:
        work()
    except (Preempted, GroupError, WorkerLost, TrainingDiverged, CheckpointError, Killed) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def worker_workspace(folder, rank, **changes):
    """Return a workspace with the scratch folder of all workers and an attempt folder for each."""
    shared = Workspace.at(folder)
    (folder / f"rank_{rank}").mkdir(exist_ok=True)
    return replace(shared, attempt=folder / f"rank_{rank}", **changes)


def train_network(rank, folder, kind):
    tensors, rows = trained(kind, worker_workspace(folder / kind, rank))
    torch.save(tensors, folder / f"{kind}_{rank}.pt")
    return rows


def accumulate_gradients(rank, folder):
    """Divide the rows of every worker into two parts."""
    config = replace(TRAINING, accumulate=2)
    tensors, rows = trained("residual_mlp", worker_workspace(folder / "accumulated", rank), config)
    torch.save(tensors, folder / f"accumulated_{rank}.pt")
    return rows


def stop_last_worker(rank, folder):
    """Stop the last worker before step 6; then resume on all."""
    stopping = stopping_at(6, folder / "stopped") if rank == SIZE - 1 else Workspace.at(folder / "stopped")
    outcome = outcome_of(lambda: trained("residual_mlp", stopping))
    tensors, rows = trained("residual_mlp", Workspace.at(folder / "stopped"))
    torch.save(tensors, folder / f"stopped_{rank}.pt")
    return {"outcome": outcome, "rows": rows}


def kill_all_workers(rank, folder):
    """Kill all workers in the middle of step 13, after a checkpoint; then resume."""
    outcome = outcome_of(lambda: trained("unet", worker_workspace(folder / "killed", rank), loss=killed_at(13)))
    tensors, rows = trained("unet", worker_workspace(folder / "killed", rank))
    torch.save(tensors, folder / f"killed_{rank}.pt")
    return {"outcome": outcome, "rows": rows}


def diverge_on_last_worker(rank, folder):
    def loss(model, batch):
        return {"loss": velocity_loss(model, batch)["loss"] * (float("inf") if rank == SIZE - 1 else 1.0)}

    return outcome_of(lambda: trained("residual_mlp", worker_workspace(folder / "diverged", rank), loss=loss))


def separate_scratch_folders(rank, folder):
    """Rank 0 reads the checkpoint of step 6, the other ranks have other scratch folders."""
    with suppress(Preempted):
        trained("residual_mlp", stopping_at(6, folder / "apart"))
    scratch = folder / ("apart" if rank == 0 else f"elsewhere_{rank}")
    return outcome_of(lambda: trained("residual_mlp", Workspace.at(scratch)))


def random_loss(rank, folder):
    """Return the random numbers that a network uses, as for dropout."""
    random_numbers = []

    def loss(model, batch):
        random_numbers.append(float(torch.rand(())))
        return velocity_loss(model, batch)

    trained("residual_mlp", worker_workspace(folder / "drawing", rank), loss=loss)
    return random_numbers


def indivisible_batch(rank, folder):
    return outcome_of(
        lambda: trained("residual_mlp", worker_workspace(folder / "odd", rank), replace(TRAINING, batch_size=7))
    )


def encode_on_rank_zero(rank, folder):
    if rank == 0:
        writer = ShardWriter(folder / "shards", 16, class_names=("one",))
        for number in range(40):
            writer.add(Sample(key=f"{number}", image=torch.full((4, 4, 1), number).byte().numpy(), label=0))
        writer.close()
        PixelCodec(image_shape=(4, 4, 1)).save(folder / "codec")
    distributed.barrier()
    workspace = worker_workspace(folder / "encoded", rank)
    latents = encode_latents([folder / "shards"], PixelCodec(image_shape=(4, 4, 1)), folder / "codec", workspace)
    return float(latents.clean.double().sum())


def write_dataset(folder):
    for name, count in (("train", 30), ("holdout", 7)):
        writer = ShardWriter(folder / name, 4)
        for number in range(count):
            pixels = torch.full((4, 4, 1), number).byte().numpy()
            writer.add(Sample(key=f"{number}", image=pixels, caption=f"one two number {number} one two"))
        writer.close()


def encode_divided(folder, workspace, stored_as="encodings"):
    """Encode `folder/dataset` with a text encoder into `workspace.scratch/out`, and return the notices."""
    codec = FrozenCodec.open(folder / "codec", PixelCodec(image_shape=(4, 4, 1)))
    config = TextConfig(kind="transformers", path=str(folder / "text"), length=5, stored_as=stored_as)
    encode_dataset(
        folder / "dataset", codec, TextEncoder.from_config(config), workspace.scratch / "out", workspace, flip=True
    )
    return workspace.notices


def divide_shards(rank, folder):
    """Encode in all workers: once stopped in the last worker, once killed in all, and then to the end."""
    if rank == 0:
        write_dataset(folder / "dataset")
        PixelCodec(image_shape=(4, 4, 1)).save(folder / "codec")
        save_tiny_encoder(folder / "text", "transformers")
    distributed.barrier()
    halting = worker_workspace(folder / "divided", rank, stopping=lambda: rank == SIZE - 1)
    outcome = outcome_of(lambda: encode_divided(folder, halting))
    notices = encode_divided(folder, worker_workspace(folder / "divided", rank))
    kept = encode_divided(folder, worker_workspace(folder / "kept", rank), "captions")
    return {"outcome": outcome, "notices": list(notices), "kept": list(kept)}


def stop_while_encoding(rank, folder):
    """Stop rank 0 while it encodes; the other ranks do not encode."""
    workspace = worker_workspace(folder / "halted", rank, stopping=lambda: rank == 0)

    def work():
        if workspace.stop_requested():
            raise Preempted("stopped after 1 of 2 images")

    return outcome_of(lambda: DataParallelGroup.join().run_on_main(work))


def lose_last_worker(rank, folder):
    """Exit the last worker in the middle of a step; this is the last scenario."""
    if rank < SIZE - 1:
        return outcome_of(lambda: trained("residual_mlp", worker_workspace(folder / "gone", rank)))
    return outcome_of(
        lambda: trained("residual_mlp", worker_workspace(folder / "gone", rank), loss=lambda model, batch: os._exit(9))
    )


SCENARIOS = {
    "residual_mlp": lambda rank, folder: train_network(rank, folder, "residual_mlp"),
    "unet": lambda rank, folder: train_network(rank, folder, "unet"),
    "dit": lambda rank, folder: train_network(rank, folder, "dit"),
    "accumulated": accumulate_gradients,
    "stopped": stop_last_worker,
    "killed": kill_all_workers,
    "diverged": diverge_on_last_worker,
    "apart": separate_scratch_folders,
    "drawing": random_loss,
    "indivisible": indivisible_batch,
    "encoded": encode_on_rank_zero,
    "divided": divide_shards,
    "halted": stop_while_encoding,
    "gone": lose_last_worker,
}


def run_worker(rank, folder):
    """Run one worker of the group in a subprocess."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "meeting"), SIZE)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    for name, scenario in SCENARIOS.items():
        result = scenario(rank, folder)
        (folder / f"{name}_{rank}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder with the results of all workers."""
    results = tmp_path_factory.mktemp("group")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=run_worker, args=(rank, results)) for rank in range(SIZE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        if worker.is_alive():
            worker.kill()
    return results


def read_results(folder, name, ranks=range(SIZE)):
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in ranks]


def tensors_of(folder, name):
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(SIZE)]


def are_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_three_workers_match_one_worker_up_to_rounding(kind, folder, tmp_path):
    """Compare predictions: noise alone moves a bias that the next layer cancels."""
    alone, rows = trained(kind, Workspace.at(tmp_path))
    first, *others = tensors_of(folder, kind)
    assert all(are_equal(first, other) for other in others), "all workers hold the same bits"
    for ours, theirs in zip(read_results(folder, kind)[0], rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(predictions(kind, first), predictions(kind, alone), rtol=1e-5, atol=1e-5)
    if kind == "residual_mlp":
        for name, value in alone.items():
            torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_parts_of_three_workers_add_up_to_the_batch(folder):
    first, *others = tensors_of(folder, "accumulated")
    assert all(are_equal(first, other) for other in others), "all workers hold the same bits"
    for name, value in tensors_of(folder, "residual_mlp")[0].items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


def predictions(kind, tensors):
    """Return the predictions of the averaged network for the data set."""
    model = build_network(*NETWORKS[kind], 3)
    model.load_state_dict(
        {name.removeprefix("average."): value for name, value in tensors.items() if name.startswith("average.")}
    )
    samples = dataset(NETWORKS[kind][1])
    with torch.no_grad():
        return call_network(model.eval(), samples.clean, torch.full((50,), 0.5), Condition(samples.class_id))


@pytest.mark.slow
def test_only_rank_zero_writes(folder):
    assert {path.name for path in (folder / "dit" / "rank_0").iterdir()} == {"metrics.jsonl", "progress.json"}
    assert not [path for rank in range(1, SIZE) for path in (folder / "dit" / f"rank_{rank}").iterdir()]


@pytest.mark.slow
def test_stop_of_one_rank_stops_all_at_the_same_step(folder):
    for rank, result in enumerate(read_results(folder, "stopped")):
        assert result["outcome"] == "Preempted: stopped at step 6 of 15; run the same command again to continue"
        assert result["rows"] == read_results(folder, "residual_mlp")[rank]
    assert are_equal(tensors_of(folder, "stopped")[0], tensors_of(folder, "residual_mlp")[0])


@pytest.mark.slow
def test_three_workers_resume_bit_for_bit_after_a_kill(folder):
    assert [result["outcome"] for result in read_results(folder, "killed")] == ["Killed: "] * SIZE
    assert [result["rows"] for result in read_results(folder, "killed")] == read_results(folder, "unet")
    assert are_equal(tensors_of(folder, "killed")[0], tensors_of(folder, "unet")[0])


@pytest.mark.slow
def test_workers_divide_the_shards_and_write_what_one_does(folder, tmp_path):
    first, *others = read_results(folder, "divided")
    assert first["outcome"].startswith("Preempted: another worker") and "37 images" in others[-1]["outcome"]
    for result, stored_as, name in (("notices", "encodings", "divided"), ("kept", "captions", "kept")):
        workspace = Workspace.at(tmp_path / name)
        alone = encode_divided(folder, workspace, stored_as)
        assert first[result] == list(alone) and not any(other[result] for other in others)
        written = {path.relative_to(folder / name / "out"): path for path in list_files(folder / name / "out")}
        expected = {path.relative_to(workspace.scratch / "out"): path for path in list_files(workspace.scratch / "out")}
        assert written.keys() == expected.keys()
        assert all(path.read_bytes() == expected[place].read_bytes() for place, path in written.items())


@pytest.mark.slow
def test_nonfinite_loss_on_one_rank_stops_all(folder):
    assert all(
        outcome.startswith("TrainingDiverged: the loss is nan at step 4")
        for outcome in read_results(folder, "diverged")
    )


@pytest.mark.slow
def test_separate_scratch_folders_are_refused(folder):
    for outcome in read_results(folder, "apart"):
        assert outcome.startswith(
            "GroupError: all workers need the same scratch folder; they read checkpoints of the steps 6, 0, 0"
        )


@pytest.mark.slow
def test_network_randomness_differs_on_every_rank(folder):
    random_numbers = [number for numbers in read_results(folder, "drawing") for number in numbers]
    assert len(set(random_numbers)) == SIZE * TRAINING.steps


@pytest.mark.slow
def test_indivisible_batch_is_refused_before_writing(folder):
    assert all(
        "a batch of 7 cannot be divided equally among 3 workers" in outcome
        for outcome in read_results(folder, "indivisible")
    )
    assert not (folder / "odd" / "checkpoints").exists()


@pytest.mark.slow
def test_all_ranks_read_the_latents_of_rank_zero(folder):
    assert len(set(read_results(folder, "encoded"))) == 1


@pytest.mark.slow
def test_stop_during_encoding_preempts_all_ranks(folder):
    assert all(outcome.startswith("Preempted") for outcome in read_results(folder, "halted"))


@pytest.mark.slow
def test_lost_worker_raises_on_the_other_ranks(folder):
    assert all(
        outcome.startswith("WorkerLost: another of the 3 workers is lost")
        for outcome in read_results(folder, "gone", [0, 1])
    )
    assert not (folder / "gone_2.json").exists()


def test_group_of_one_has_the_full_batch():
    assert DataParallelGroup.join() == DataParallelGroup(0, 1)
    assert DataParallelGroup().local_rows(7) == slice(None)


@pytest.mark.parametrize(("size", "sizes"), [(2, "6 or 8"), (3, "6 or 9"), (8, "8 or 8")])
def test_indivisible_batch_error_names_valid_sizes(size, sizes):
    with pytest.raises(GroupError, match=f"a batch of 7 .* among {size} workers; choose a batch of {sizes}"):
        DataParallelGroup(0, size).local_rows(7)
