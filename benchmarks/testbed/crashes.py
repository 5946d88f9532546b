"""Crash a small run and continue it: SIGKILL of the controller at random instants, and a disk that becomes full.

A forked copy of this process, which has the imports, calls the command: a crash costs little, so there can be many.
"""

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orchestrator.run.worker  # noqa: F401 - loads the numeric libraries once, before the forks
from benchmarks.record import Claim
from benchmarks.testbed.tiny_run import TINY
from ddm_core.artifacts import read_manifest
from orchestrator.cli.app import main as ddm
from orchestrator.config.hydra_compose import compose  # noqa: F401 - loaded before the forks
from orchestrator.run.marked_processes import MARK, find_marked_processes
from orchestrator.run.run_folder import RunFolder

SETTINGS = (*TINY, "expert.training.steps=60", "expert.training.checkpoint_every=5", "router.training.steps=20")
"""A run of every kind of stage in seconds."""

EXIT_S = 60.0
"""Longest wait for the processes of a killed run to end."""

TIMEOUT_S = 600.0

SAVING = re.compile(r"^\.")
"""Names of folders and files that are not complete yet."""


@dataclass(frozen=True, slots=True)
class Crashable:
    """A run folder, and the backend of its run."""

    folder: Path
    backend: str
    output: Path
    """File for everything that its commands print."""

    def start(self) -> int:
        """Start `ddm run` in a forked process, in a process group of its own, and return its id."""
        arguments = ["ddm", "run", *SETTINGS, f"compute={self.backend}", "compute.cpus=1", f"folder={self.folder}"]
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.argv = arguments
        code = 1
        try:
            ddm()
            code = 0
        except SystemExit as exit_request:
            code = exit_request.code if isinstance(exit_request.code, int) else 1
        finally:
            sys.stdout.flush()
            os._exit(code)

    def checksums(self) -> dict[str, dict[str, str]]:
        """Return the checksums of all files by artifact."""
        artifacts = sorted((self.folder / "artifacts").iterdir())
        return {artifact.name: dict(read_manifest(artifact).checksums) for artifact in artifacts}

    def count_double(self) -> int:
        """Return the number of attempts that were submitted twice and of stages that were finished twice."""
        events = RunFolder(self.folder).read_events()
        submitted = Counter((e["stage"], e["attempt"]) for e in events if e["event"] == "submitted")
        finished = Counter(e["fingerprint"] for e in events if e["event"] == "finished")
        return sum(count - 1 for count in (*submitted.values(), *finished.values()))


@dataclass(slots=True)
class Killings:
    """Kills controllers of one sequence of runs."""

    rng: random.Random
    duration_s: float
    """Of an undisturbed run."""
    kinds: Counter[str] = field(default_factory=Counter)

    def kill(self, run: Crashable, pid: int) -> bool:
        """Kill a controller at a random instant; return False if it ended before."""
        kind = self.rng.choice(("instant", "instant", "instant", "handler", "save", "take-over"))
        deadline = time.monotonic() + self.rng.uniform(0.0, self.duration_s / 2)
        before = _generations(run.folder)

        def is_due() -> bool:
            if kind == "take-over":
                return _generations(run.folder) != before
            return time.monotonic() > deadline and (kind != "save" or _is_saving(run.folder))

        while not is_due():
            if _has_ended(pid):
                os.waitpid(pid, 0)
                return False
            time.sleep(0.001)
        if kind == "handler":
            os.kill(pid, signal.SIGTERM)
            time.sleep(self.rng.uniform(0.0, 0.05))
        has_ended = _has_ended(pid)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.kinds[kind] += not has_ended
        return not has_ended


def kill_controllers(folder: Path, backend: str, kills: int, rng: random.Random) -> Claim:
    """Kill controllers of a backend at random instants, continue each run to its end, and compare its files."""
    with _private_temporary_folder(folder) as temporary:
        started = time.monotonic()
        reference = Crashable(folder / "reference", backend, folder / "output.txt")
        _finish(reference)
        expected, killings = reference.checksums(), Killings(rng, time.monotonic() - started)
        shared_memory, identical, double, runs = _usage(Path("/dev/shm")), 0, 0, 0  # noqa: S108
        while killings.kinds.total() < kills:
            run = Crashable(folder / f"run_{runs}", backend, folder / "output.txt")
            while killings.kinds.total() < kills and killings.kill(run, run.start()):
                pass
            _finish(run)
            identical, double, runs = identical + (run.checksums() == expected), double + run.count_double(), runs + 1
            shutil.rmtree(run.folder)
        leaked, left = _wait_for_end(str(folder)), _usage(temporary)
        left += max(0, _usage(Path("/dev/shm")) - shared_memory)  # noqa: S108
    kinds = ", ".join(f"{count} at {kind}" for kind, count in killings.kinds.items())
    return Claim(
        name=f"controller killed on backend {backend}: {killings.kinds.total()} SIGKILLs at random instants",
        bar="byte-identical; 0 double runs, 0 leaked processes after 60 s, 0 bytes left",
        value=f"{identical} of {runs} runs byte-identical; {double} double runs, {leaked} processes, {left} bytes left",
        spread=f"{kinds}; {time.monotonic() - started:.0f} s",
        holds=identical == runs and double == leaked == left == 0,
    )


def fill_disk(folder: Path, count: int, rng: random.Random) -> Claim:
    """Fill the disk at random bytes of a run, free it, continue, and compare the files; needs root."""
    started = time.monotonic()
    reference = Crashable(folder / "reference", "inline", folder / "output.txt")
    _finish(reference)
    expected, size = reference.checksums(), _usage(reference.folder)
    problems: list[str] = []
    stages: Counter[str] = Counter()
    for number in range(count):
        with _small_disk(folder / f"disk_{number}", 4 * size + 2**22) as disk:
            run = Crashable(disk / "run", "inline", folder / f"output_{number}.txt")
            _leave_free(disk / "filler", rng.randrange(4096, size))
            code = os.waitstatus_to_exitcode(os.waitpid(run.start(), 0)[1])
            text = run.output.read_text(errors="replace")
            if code == 0 or "Traceback" in text or "DiskFull" not in text:
                problems.append(f"exit code {code}: {text[-300:]}")
            stages[_last_stage(run)] += 1
            (disk / "filler").unlink()
            _finish(run)
            if run.checksums() != expected:
                problems.append("another result after the disk was freed")
    for problem in problems[:5]:
        print(f"  {problem}", flush=True)
    return Claim(
        name=f"disk full at {count} random bytes of a run",
        bar="one message each, resume identical",
        value=f"{count - len(problems)} of {count}",
        spread=f"in {len(stages)} stages: {', '.join(sorted(stages))}; {time.monotonic() - started:.0f} s",
        holds=not problems,
    )


def _finish(run: Crashable) -> None:
    """Run to the end; raises `RuntimeError` if that fails."""
    pid, deadline = run.start(), time.monotonic() + TIMEOUT_S
    while not (result := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    if (code := os.waitstatus_to_exitcode(result[1])) != 0:
        raise RuntimeError(f"a run must continue to its end; exit code {code}: {run.output.read_text()[-2000:]}")


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _is_saving(folder: Path) -> bool:
    """Return whether an artifact or a checkpoint is being written."""
    places = [folder / "artifacts", *folder.glob("work/*/state")]
    names = itertools.chain.from_iterable(os.listdir(place) for place in places if place.is_dir())
    return any(SAVING.match(name) for name in names)


def _generations(folder: Path) -> list[str]:
    place = folder / "controllers"
    return sorted(name for name in os.listdir(place) if name.endswith(".json")) if place.is_dir() else []


def _last_stage(run: Crashable) -> str:
    """Return the kind of the stage that was submitted last, or `none`."""
    journal = run.folder / "journal.jsonl"
    submitted = (
        [e["stage"] for e in RunFolder(run.folder).read_events() if e["event"] == "submitted"]
        if journal.exists()
        else []
    )
    return re.sub(r"_\d+$", "", submitted[-1]) if submitted else "none"


def _usage(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _wait_for_end(mark: str) -> int:
    """Return the number of processes that still run after a wait."""
    deadline = time.monotonic() + EXIT_S
    while (alive := find_marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return len(alive)


@contextmanager
def _private_temporary_folder(folder: Path) -> Iterator[Path]:
    """Use a new temporary folder, and mark all processes that start, while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="dc-") as name:
        before = dict(os.environ)
        os.environ |= {"TMPDIR": name, MARK: str(folder)}
        tempfile.tempdir = None
        try:
            yield Path(name)
        finally:
            os.environ.clear()
            os.environ.update(before)
            tempfile.tempdir = None


@contextmanager
def _small_disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "ddm-crashes", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def _leave_free(filler: Path, free: int) -> None:
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(filler.parent).free - free)


def crash_claims(kills: int, ray_kills: int, disks: int, seed: int = 0) -> Iterator[Claim]:
    """Yield one claim per kind of crash."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ddm-crashes-") as temporary:
        folders = [Path(temporary) / name for name in ("inline", "ray", "disk")]
        for folder in folders:
            folder.mkdir()
        if kills:
            yield kill_controllers(folders[0], "inline", kills, rng)
        if ray_kills:
            yield kill_controllers(folders[1], "ray_local", ray_kills, rng)
        if disks:
            yield fill_disk(folders[2], disks, rng)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--ray-kills", type=int, default=20)
    parser.add_argument("--disks", type=int, default=50)
    options = parser.parse_args(arguments)
    for claim in crash_claims(options.kills, options.ray_kills, options.disks):
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})", flush=True)


if __name__ == "__main__":
    main()
