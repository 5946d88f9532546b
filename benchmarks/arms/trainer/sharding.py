"""Two workers that share one network (FSDP2, over gloo) against one, resumed with one after two, and killed."""

import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arms.trainer.cases import Effort, Measured
from benchmarks.record import Claim
from benchmarks.testbed.sharded_training import (
    KILLED,
    kill_at_random,
    predict,
    start_workers,
    stopping_at,
    train,
    worker_workspace,
)
from ddm_core.artifacts import Preempted, Workspace

KILLS = 20
UNKILLED = replace(KILLED, checkpoint_every=10**6)
CHECKPOINTS = 200
"""Checkpoints that must be read."""


def measure_sharding(effort: Effort) -> Measured:
    """Train with two workers and with one, and kill both workers; a tiny measurement kills them once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        claims = compare_workers(folder / "compared")
        claims += kill_workers(folder / "killed", 1 if effort.is_tiny else KILLS)
    return claims, []


def compare_workers(folder: Path) -> list[Claim]:
    """Compare trainings by two workers and by one, stopped and resumed by as many, fewer or more."""
    folder.mkdir()
    with suppress(Preempted):
        train(stopping_at(6, folder / "by_one"))
    workers = start_workers(folder, train_in_two)
    alone = predict(train(Workspace.at(folder / "alone")))
    for worker in workers:
        worker.join(300)
    results = {name: load(folder / f"{name}_0.pt") for name in ("whole", "stopped", "by_one")}
    across = {name: relative(predict(results[name]), alone) for name in ("whole", "by_one")}
    across["by_two"] = relative(predict(train(Workspace.at(folder / "by_two"))), alone)
    return [
        claim_equal_bits(
            "sharding: FSDP2 by two workers, stopped and resumed by two, has the bits of an unbroken training",
            results["stopped"],
            results["whole"],
        ),
        Claim(
            name="sharding: predictions by two workers against one, resumed by two after one, and by one after two",
            bar="≤ 1e-5",
            value=f"{max(across.values()):.1e}",
            spread=", ".join(f"{value:.1e}" for value in across.values()),
            holds=max(across.values()) <= 1e-5,
        ),
    ]


def claim_equal_bits(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], steps: str = "") -> Claim:
    """Return the claim that all tensors of two trainings are equal."""
    holds = all(torch.equal(expected[path], value) for path, value in found.items())
    value, spread = "all" if holds else "not all", f"n = {len(found)} tensors{steps}"
    return Claim(name=name, bar="all", value=value, spread=spread, holds=holds)


def train_in_two(rank: int, folder: Path) -> None:
    """Train to the end; stop and resume; resume what one worker stopped; leave one for one worker."""
    torch.save(train(worker_workspace(folder / "whole", rank)), folder / f"whole_{rank}.pt")
    with suppress(Preempted):
        train(stopping_at(6, folder / "stopped"))
    if rank == 0:
        shutil.copytree(folder / "stopped", folder / "by_two")
    torch.save(train(Workspace.at(folder / "stopped")), folder / f"stopped_{rank}.pt")
    torch.save(train(Workspace.at(folder / "by_one")), folder / f"by_one_{rank}.pt")


def kill_workers(folder: Path, kills: int) -> list[Claim]:
    """Kill one worker or both at random instants, and compare what they end with."""
    folder.mkdir()
    found = kill_at_random(folder, kills)
    for worker in start_workers(folder, train_unkilled):
        worker.join(300)
    killed, unkilled = load(folder / "killed_0.pt"), load(folder / "unkilled_0.pt")
    alone = predict(train(Workspace.at(folder / "whole"), UNKILLED))
    codes = Counter(found.left)
    return [
        Claim(
            name="sharding: torn checkpoints of those that were read while one worker or both were killed",
            bar="0",
            value=f"{found.torn} of {found.read}",
            spread=f"{found.kills} kills at random instants, of {KILLED.steps} checkpoints written",
            holds=found.torn == 0 and found.kills == kills and found.read >= CHECKPOINTS,
        ),
        Claim(
            name="sharding: workers that ended by themselves after their peer was killed",
            bar="all",
            value=f"{found.ended} of {len(found.left)}",
            spread=", ".join(f"exit code {code}: {count}" for code, count in codes.items()),
            holds=found.ended == len(found.left),
        ),
        claim_equal_bits(
            "sharding: the killed training of two workers has the bits of one that was never stopped",
            killed,
            unkilled,
            f", {KILLED.steps} steps",
        ),
        Claim(
            name="sharding: predictions of the killed training against one worker's that was never stopped",
            bar="≤ 1e-5",
            value=f"{relative(predict(killed), alone):.1e}",
            spread=f"{KILLED.steps} steps",
            holds=relative(predict(killed), alone) <= 1e-5,
        ),
    ]


def train_unkilled(rank: int, folder: Path) -> None:
    """Train as long without being killed, and without a checkpoint."""
    torch.save(train(worker_workspace(folder / "unkilled", rank), UNKILLED), folder / f"unkilled_{rank}.pt")


def load(path: Path) -> dict[str, Tensor]:
    """Return the tensors that a worker saved."""
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
