"""Two workers that keep parts of one network each (FSDP2, over gloo): started, stopped, and killed at random."""

import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch import Tensor, distributed

from ddm_core.artifacts import ArtifactError, Workspace, read_with_checksum
from ddm_core.files.checksums import checksum
from experts.conditions.condition import Condition
from experts.config import DiTConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.registry import build_network, call_network
from experts.training.checkpoint import STATE, TENSORS
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit

WORKERS = 2
SHARDED = TrainingConfig(
    steps=12, batch_size=8, warmup_steps=3, log_every=4, checkpoint_every=5, held_out_every=None, parallel="fsdp"
)
KILLED = replace(SHARDED, steps=240, checkpoint_every=1)
TIMEOUT_S, PATIENCE_S = 30.0, 90.0
"""Most time that a worker waits for its peer, also for one that was killed before they met, and that it may take to end
then."""
POLL_S = 0.01
MOST_CHECKPOINTS, LONGEST_S = 12, 0.3
"""A kill is up to so long after up to so many checkpoints, less one."""
NETWORK, SHAPE, CLASSES = DiTConfig(patch_size=4, heads=2, head_width=8, depth=2), (1, 8, 8), 3

Work = Callable[[int, Path], None]
"""What a worker does: a function of a module, of (rank, folder)."""


def small_dataset(shape: tuple[int, ...]) -> LatentDataset:
    """Return 50 latents of three classes, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return LatentDataset(
        clean=torch.randn(50, *shape, generator=generator),
        class_id=torch.arange(50) % CLASSES,
        cluster_id=torch.zeros(50, dtype=torch.int64),
    )


def worker_workspace(folder: Path, rank: int) -> Workspace:
    """Return a workspace with the scratch folder of all workers and an attempt folder for each."""
    shared = Workspace.at(folder)
    (folder / f"rank_{rank}").mkdir(exist_ok=True)
    return replace(shared, attempt=folder / f"rank_{rank}")


def stopping_at(step: int, folder: Path) -> Workspace:
    """Return a workspace that requests a stop before a step."""
    calls = itertools.count()
    return replace(Workspace.at(folder), stopping=lambda: next(calls) == step)


def train(workspace: Workspace, config: TrainingConfig = SHARDED) -> dict[str, Tensor]:
    """Train in the process group of this process, if it has one, and return the averaged parameters."""
    torch.manual_seed(5)
    model = build_network(NETWORK, SHAPE, CLASSES)
    dataset = small_dataset(SHAPE)
    trained = fit(
        model,
        lambda network, batch: expert_loss(network, batch, "velocity", RECTIFIED_FLOW),
        dataset,
        config,
        workspace,
    )
    return trained.model.state_dict()


def predict(tensors: dict[str, Tensor]) -> Tensor:
    """Return the predictions of these parameters; noise alone moves a bias that the next layer cancels."""
    model, samples = build_network(NETWORK, SHAPE, CLASSES), small_dataset(SHAPE)
    model.load_state_dict(tensors)
    with torch.no_grad():
        return call_network(model.eval(), samples.clean, torch.full((50,), 0.5), Condition(samples.class_id))


def run_worker(rank: int, folder: Path, work: Work) -> None:
    """Run one worker of the group in a subprocess."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{meeting_place(folder, work)}"
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=WORKERS, timeout=timedelta(seconds=TIMEOUT_S)
    )
    work(rank, folder)
    distributed.destroy_process_group()


def meeting_place(folder: Path, work: Work) -> Path:
    """Return the file by which the workers find each other."""
    return folder / f"meeting-{work.__name__}"


def start_workers(folder: Path, work: Work) -> list[ForkServerProcess]:
    """Start both workers, forked from a process that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    workers = [context.Process(target=run_worker, args=(rank, folder, work)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    return workers


class CheckpointReader:
    """Reads every checkpoint that it finds in a folder once, while a training writes there or after it was killed."""

    def __init__(self, folder: Path) -> None:
        """Begin with no checkpoint read."""
        self.folder = folder
        self.read: set[str] = set()
        self.torn: set[str] = set()

    def look(self) -> int:
        """Read the newest checkpoint if it is new, and return its step; 0 without one."""
        newest = self._newest()
        if newest is None:
            return 0
        if newest.name not in self.read:
            is_whole = _is_whole(newest)
            if is_whole or self._newest() == newest:  # an older one may be deleted while it is read
                self.read.add(newest.name)
                self.torn |= set() if is_whole else {newest.name}
        return int(newest.name.removeprefix("step-"))

    def _newest(self) -> Path | None:
        return max(self.folder.glob("step-*"), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether the tensors of a checkpoint are those of its checksums."""
    try:
        return bool(checksum(checkpoint / TENSORS) == read_with_checksum(checkpoint / STATE)["sha256"])
    except (ArtifactError, FileNotFoundError):
        return False


@dataclass(slots=True, kw_only=True)
class Killings:
    """What was found of workers that were killed."""

    kills: int = 0
    read: int = 0
    """Checkpoints that were read, while the workers trained and after they were killed."""
    torn: int = 0
    left: list[int | None] = field(default_factory=list)
    """Exit codes of workers whose peer was killed; None for one that did not end by itself."""

    @property
    def ended(self) -> int:
        """Return how many of those workers ended by themselves."""
        return sum(code is not None for code in self.left)


def train_until_killed(rank: int, folder: Path) -> None:
    """Train with a checkpoint at every step, and save the result of the last start."""
    torch.save(train(worker_workspace(folder / "killed", rank), KILLED), folder / f"killed_{rank}.pt")


def kill_at_random(folder: Path, kills: int) -> Killings:
    """Kill one worker or both so often, at random instants; then let them finish.

    An instant is a random time after a random number of new checkpoints, so that slow machines are killed as often
    while they train as fast ones. A worker whose peer was killed gets `PATIENCE_S` to end by itself. The result is that
    of `train_until_killed`; fewer kills happen if the training ends before.
    """
    reader, found = CheckpointReader(folder / "killed" / "checkpoints"), Killings()
    while not all((folder / f"killed_{rank}.pt").exists() for rank in range(WORKERS)):
        chance = random.Random(found.kills)
        before, more = reader.look(), chance.randrange(MOST_CHECKPOINTS)
        workers = start_workers(folder, train_until_killed)
        while all(worker.is_alive() for worker in workers) and (found.kills >= kills or reader.look() < before + more):
            time.sleep(POLL_S)
            reader.look()
        if found.kills < kills and all(worker.is_alive() for worker in workers):
            time.sleep(chance.uniform(0, LONGEST_S))
            victims = chance.choice([workers, workers[:1], workers[1:]])
            for victim in victims:
                victim.kill()
            found.kills += 1
            found.left += [end_of(worker) for worker in workers if worker not in victims]
        for worker in workers:
            end_of(worker)
        reader.look()
        meeting_place(folder, train_until_killed).unlink(missing_ok=True)
    found.read, found.torn = len(reader.read), len(reader.torn)
    return found


def end_of(worker: ForkServerProcess) -> int | None:
    """Wait for a worker, and return its exit code; kill it after `PATIENCE_S`, and return None."""
    worker.join(PATIENCE_S)
    if worker.exitcode is None:
        worker.kill()
        worker.join()
        return None
    return worker.exitcode
