"""Three workers, started once by torch.distributed alone, go through every scenario one after the other."""

import json
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import distributed

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Preempted, Workspace
from experts.codec import PixelCodec
from experts.condition import Condition
from experts.config import TrainingConfig
from experts.networks.registry import build_network, call_network
from experts.training.checkpoint import CheckpointError
from experts.training.distributed import DataParallelGroup, GroupError, WorkerLost
from experts.training.latent_dataset import LatentDataset, encode_latents
from experts.training.trainer import TrainingDiverged, fit
from tests.experts.training.test_trainer import NETWORKS, Killed, killed_at, stopping_at, velocity_loss

SIZE = 3
TRAINING = TrainingConfig(steps=15, batch_size=9, warmup_steps=3, log_every=4, checkpoint_every=5)


def dataset(shape):
    """What every worker sees."""
    generator = torch.Generator().manual_seed(0)
    return LatentDataset(
        clean=torch.randn(50, *shape, generator=generator),
        class_id=torch.arange(50) % 3,
        cluster_id=torch.zeros(50, dtype=torch.int64),
    )


def trained(kind, workspace, config=TRAINING, loss=velocity_loss):
    """Averaged parameters, last parameters and metrics rows, as one dictionary of tensors and one of rows."""
    torch.manual_seed(5)
    model = build_network(*NETWORKS[kind], 3)
    fitted = fit(model, loss, dataset(NETWORKS[kind][1]), config, workspace)
    averaged = {f"average.{name}": value for name, value in fitted.model.state_dict().items()}
    return averaged | model.state_dict(), fitted.rows


def ended(work):
    """How a piece of work ended, as plain text."""
    try:
        work()
    except (Preempted, GroupError, WorkerLost, TrainingDiverged, CheckpointError, Killed) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def own(folder, rank, **changes):
    """One scratch folder for all, an attempt folder for each."""
    shared = Workspace.at(folder)
    (folder / f"rank_{rank}").mkdir(exist_ok=True)
    return replace(shared, attempt=folder / f"rank_{rank}", **changes)


def equal_to_one_worker(rank, folder, kind):
    tensors, rows = trained(kind, own(folder / kind, rank))
    torch.save(tensors, folder / f"{kind}_{rank}.pt")
    return rows


def stopped_by_the_last(rank, folder):
    """Only the last worker hears that it should stop, before step 6; then all go on."""
    stopping = stopping_at(6, folder / "stopped") if rank == SIZE - 1 else Workspace.at(folder / "stopped")
    said = ended(lambda: trained("residual_mlp", stopping))
    tensors, rows = trained("residual_mlp", Workspace.at(folder / "stopped"))
    torch.save(tensors, folder / f"stopped_{rank}.pt")
    return {"said": said, "rows": rows}


def killed_everywhere(rank, folder):
    """Dead in the middle of step 13, after a checkpoint; a worker that is gone cannot be waited for."""
    said = ended(lambda: trained("unet", own(folder / "killed", rank), loss=killed_at(13)))
    tensors, rows = trained("unet", own(folder / "killed", rank))
    torch.save(tensors, folder / f"killed_{rank}.pt")
    return {"said": said, "rows": rows}


def diverged_in_the_last(rank, folder):
    def loss(model, batch):
        return {"loss": velocity_loss(model, batch)["loss"] * (float("inf") if rank == SIZE - 1 else 1.0)}

    return ended(lambda: trained("residual_mlp", own(folder / "diverged", rank), loss=loss))


def apart(rank, folder):
    """The first worker finds the checkpoint of step 6, the others look elsewhere."""
    with suppress(Preempted):
        trained("residual_mlp", stopping_at(6, folder / "apart"))
    found = folder / ("apart" if rank == 0 else f"elsewhere_{rank}")
    return ended(lambda: trained("residual_mlp", Workspace.at(found)))


def drawing(rank, folder):
    """What a network itself draws, such as its dropout."""
    drawn = []

    def loss(model, batch):
        drawn.append(float(torch.rand(())))
        return velocity_loss(model, batch)

    trained("residual_mlp", own(folder / "drawing", rank), loss=loss)
    return drawn


def indivisible(rank, folder):
    return ended(lambda: trained("residual_mlp", own(folder / "odd", rank), replace(TRAINING, batch_size=7)))


def encoded(rank, folder):
    if rank == 0:
        writer = ShardWriter(folder / "shards", 16, class_names=("one",))
        for number in range(40):
            writer.add(Sample(key=f"{number}", image=torch.full((4, 4, 1), number).byte().numpy(), label=0))
        writer.close()
        PixelCodec(image_shape=(4, 4, 1)).save(folder / "codec")
    distributed.barrier()
    workspace = own(folder / "encoded", rank)
    latents = encode_latents([folder / "shards"], PixelCodec(image_shape=(4, 4, 1)), folder / "codec", workspace)
    return float(latents.clean.double().sum())


def stopped_while_encoding(rank, folder):
    """Only the first worker encodes, so it alone can be asked to stop."""
    workspace = own(folder / "halted", rank, stopping=lambda: rank == 0)

    def work():
        if workspace.stop_requested():
            raise Preempted("stopped after 1 of 2 images")

    return ended(lambda: DataParallelGroup.join().run_on_main(work))


def one_is_gone(rank, folder):
    """The last scenario: the last worker vanishes in the middle of a step."""
    if rank < SIZE - 1:
        return ended(lambda: trained("residual_mlp", own(folder / "gone", rank)))
    return ended(lambda: trained("residual_mlp", own(folder / "gone", rank), loss=lambda model, batch: os._exit(9)))


SCENARIOS = {
    "residual_mlp": lambda rank, folder: equal_to_one_worker(rank, folder, "residual_mlp"),
    "unet": lambda rank, folder: equal_to_one_worker(rank, folder, "unet"),
    "dit": lambda rank, folder: equal_to_one_worker(rank, folder, "dit"),
    "stopped": stopped_by_the_last,
    "killed": killed_everywhere,
    "diverged": diverged_in_the_last,
    "apart": apart,
    "drawing": drawing,
    "indivisible": indivisible,
    "encoded": encoded,
    "halted": stopped_while_encoding,
    "gone": one_is_gone,
}


def member(rank, folder):
    """One worker of the group, in a process of its own."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "meeting"), SIZE)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    for name, scenario in SCENARIOS.items():
        found = scenario(rank, folder)
        (folder / f"{name}_{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the workers have written what happened to them."""
    found = tmp_path_factory.mktemp("group")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=member, args=(rank, found)) for rank in range(SIZE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        if worker.is_alive():
            worker.kill()
    return found


def told(folder, name, ranks=range(SIZE)):
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in ranks]


def tensors_of(folder, name):
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(SIZE)]


def are_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_three_workers_train_as_one_does_up_to_rounding(kind, folder, tmp_path):
    """What is compared is what the network does: a bias that the next layer takes out again is moved by noise alone."""
    alone, rows = trained(kind, Workspace.at(tmp_path))
    first, *others = tensors_of(folder, kind)
    assert all(are_equal(first, other) for other in others), "all workers hold the same bits"
    for ours, theirs in zip(told(folder, kind)[0], rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(predictions(kind, first), predictions(kind, alone), rtol=1e-5, atol=1e-5)
    if kind == "residual_mlp":
        for name, value in alone.items():
            torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)


def predictions(kind, tensors):
    """What the averaged network makes of the data set."""
    model = build_network(*NETWORKS[kind], 3)
    model.load_state_dict(
        {name.removeprefix("average."): value for name, value in tensors.items() if name.startswith("average.")}
    )
    samples = dataset(NETWORKS[kind][1])
    with torch.no_grad():
        return call_network(model.eval(), samples.clean, torch.full((50,), 0.5), Condition(samples.class_id))


@pytest.mark.slow
def test_the_first_worker_alone_writes(folder):
    assert {path.name for path in (folder / "dit" / "rank_0").iterdir()} == {"metrics.jsonl", "progress.json"}
    assert not [path for rank in range(1, SIZE) for path in (folder / "dit" / f"rank_{rank}").iterdir()]


@pytest.mark.slow
def test_one_that_hears_a_stop_stops_all_at_the_same_step_and_nothing_is_lost(folder):
    for rank, found in enumerate(told(folder, "stopped")):
        assert found["said"] == "Preempted: stopped at step 6 of 15; start it again to continue"
        assert found["rows"] == told(folder, "residual_mlp")[rank]
    assert are_equal(tensors_of(folder, "stopped")[0], tensors_of(folder, "residual_mlp")[0])


@pytest.mark.slow
def test_killed_and_continued_three_workers_give_the_same_bits(folder):
    assert [found["said"] for found in told(folder, "killed")] == ["Killed: "] * SIZE
    assert [found["rows"] for found in told(folder, "killed")] == told(folder, "unet")
    assert are_equal(tensors_of(folder, "killed")[0], tensors_of(folder, "unet")[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_anywhere_ends_all(folder):
    assert all(said.startswith("TrainingDiverged: the loss is nan at step 4") for said in told(folder, "diverged"))


@pytest.mark.slow
def test_workers_that_do_not_share_a_scratch_folder_are_told_so(folder):
    for said in told(folder, "apart"):
        assert said.startswith("GroupError: the workers found checkpoints of the steps 6, 0, 0")


@pytest.mark.slow
def test_what_a_network_draws_is_another_on_every_worker(folder):
    drawn = [number for numbers in told(folder, "drawing") for number in numbers]
    assert len(set(drawn)) == SIZE * TRAINING.steps


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(folder):
    assert all("a batch of 7 cannot be shared equally by 3 workers" in said for said in told(folder, "indivisible"))
    assert not (folder / "odd" / "checkpoints").exists()


@pytest.mark.slow
def test_all_read_what_the_first_has_encoded(folder):
    assert len(set(told(folder, "encoded"))) == 1


@pytest.mark.slow
def test_a_stop_while_the_first_worker_encodes_is_nobodys_failure(folder):
    assert all(said.startswith("Preempted") for said in told(folder, "halted"))


@pytest.mark.slow
def test_a_worker_that_vanishes_breaks_the_group_and_says_so(folder):
    assert all(
        said.startswith("GroupBroken: another of the 3 workers is gone") for said in told(folder, "gone", [0, 1])
    )
    assert not (folder / "gone_2.json").exists()


def test_a_group_of_one_takes_the_whole_batch():
    assert DataParallelGroup.join() == DataParallelGroup(0, 1)
    assert DataParallelGroup().local_rows(7) == slice(None)


@pytest.mark.parametrize(("size", "tries"), [(2, "6 or 8"), (3, "6 or 9"), (8, "8 or 8")])
def test_a_batch_that_cannot_be_shared_says_which_can(size, tries):
    with pytest.raises(GroupError, match=f"a batch of 7 .* by {size} workers; take a batch of {tries}"):
        DataParallelGroup(0, size).local_rows(7)
