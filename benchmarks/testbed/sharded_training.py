"""Two workers that keep parts of one network each (FSDP2, over gloo): started, stopped, and killed at random."""

import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch import Tensor, distributed

from ddm_core.artifacts import Workspace, read_with_checksum
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
KILLED = replace(SHARDED, steps=400, checkpoint_every=1)
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
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORKERS)
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


@dataclass(slots=True, kw_only=True)
class Killings:
    """What was found after both workers had been killed."""

    kills: int = 0
    read: int = 0
    """Checkpoints that were found after a kill, and read."""
    torn: int = 0


def train_until_killed(rank: int, folder: Path) -> None:
    """Train with a checkpoint at every step, and save the result of the last start."""
    torch.save(train(worker_workspace(folder / "killed", rank), KILLED), folder / f"killed_{rank}.pt")


def kill_at_random(folder: Path, kills: int, longest_s: float) -> Killings:
    """Kill both workers so often, each time up to `longest_s` after a checkpoint exists; then let them finish.

    The result is that of `train_until_killed`; fewer kills happen if the training ends before.
    """
    checkpoints, found = folder / "killed" / "checkpoints", Killings()
    while not (folder / f"killed_{WORKERS - 1}.pt").exists():
        workers = start_workers(folder, train_until_killed)
        if found.kills < kills:
            while not checkpoints.exists() and any(worker.is_alive() for worker in workers):
                time.sleep(0.01)
            time.sleep(random.Random(found.kills).uniform(0, longest_s))
            for worker in workers:
                worker.kill()
            found.kills += 1
        for worker in workers:
            worker.join(300)
        for checkpoint in checkpoints.glob("step-*"):
            found.read += 1
            found.torn += checksum(checkpoint / TENSORS) != read_with_checksum(checkpoint / STATE)["sha256"]
        meeting_place(folder, train_until_killed).unlink(missing_ok=True)
    return found
