"""One controller per run: numbered lease files, each of which can be created only once.

`controllers/<generation>.json` names a controller; the highest generation is the lease. A controller takes over by
creating the next generation, which the file system allows to one process: by a hard link, or by exclusive creation
where there are no hard links. Files of earlier generations stay until they are far behind, so that a process with an
old view of the folder cannot create one of them again. A controller below the highest generation has lost the lease.

A controller is *running*, *dead* or *unknown*. On this machine its process can be looked up. On another machine, or in
another container, it counts as dead only when its heartbeat is older than the lease.
"""

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from ddm_core.artifacts import ArtifactError, UnfinishedArtifact, with_checksum, write_record
from ddm_core.files.exclusive_files import create_once
from ddm_core.json_values import read_record
from orchestrator.errors import LeaseLost, RunFolderError, RunIsLocked
from orchestrator.run.run_folder import RunFolder

LEASE_S = 30.0
"""A controller on another machine counts as dead after this time without a heartbeat."""

HEARTBEAT_S = 5.0
"""Time between two heartbeats."""

GENERATION = re.compile(r"[0-9]{1,9}\.json")
"""Name of a lease file."""

RELEASE_FILE = re.compile(r"\.([0-9]{1,9})\.[0-9a-f]{8}")
"""Name of the record of a release that is not in use yet."""

KEPT_GENERATIONS = 64
"""Lease files that stay behind the present one: more take-overs than a process can miss between two looks."""


class ProcessRecord(TypedDict):
    """A process, as it is recorded in a run folder."""

    host: str
    pid: Annotated[int, Field(ge=0, lt=2**32)]
    started: str | None
    """Start time in clock ticks since boot."""
    pids: NotRequired[str]
    """Its namespace of process ids."""
    time: NotRequired[FiniteFloat]
    """Seconds since the epoch at which a worker began."""
    released: NotRequired[bool]
    """Whether a controller has given its lease back."""


def this_process() -> ProcessRecord:
    """Return this process's host, pid and start time, which identify it even after its pid is reused."""
    host = _describe_host()
    return {
        "host": host["host"],
        "pids": host["pids"],
        "pid": os.getpid(),
        "started": process_start_time(os.getpid()),
    }


def is_on_this_host(process: ProcessRecord) -> bool:
    """Return whether a recorded process can be looked up by its pid: same host, same container."""
    return _describe_host().items() <= process.items() and Path("/proc/self/stat").exists()


def _describe_host() -> dict[str, str]:
    namespace = Path("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "pids": str(namespace.readlink()) if namespace.is_symlink() else ""}


def process_start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a run's lease."""

    process: ProcessRecord
    """As returned by `this_process`."""
    age_s: float
    """Seconds since its last heartbeat."""

    @property
    def is_alive(self) -> bool:
        """Return whether it may still be running."""
        return is_alive(self.process, self.age_s)

    def __str__(self) -> str:
        return f"process {self.process['pid']} on {self.process['host']}"


def read_holder(run: RunFolder) -> Holder | None:
    """Return the process that holds the run's lease, dead or alive; None if the lease is free."""
    return _read_latest(run.controllers)[1]


def _read_latest(folder: Path) -> tuple[int, Holder | None]:
    """Return the latest generation, 0 before the first, and its holder, in one look."""
    while generations := _list_generations(folder):
        path = _lease_file(folder, generations[-1])
        try:
            age_s, record = time.time() - path.stat().st_mtime, _read(path)
        except FileNotFoundError:
            continue
        return generations[-1], None if record and record.get("released") else Holder(
            record or _unknown_process(path), age_s
        )
    return 0, None


def _unknown_process(path: Path) -> ProcessRecord:
    """Return the holder of a lease file that has no readable content: it is being written, or it is damaged."""
    return {"host": f"an unknown host, as {path} is damaged", "pid": 0, "started": None}


def seconds_since_change(attempt: Path) -> float:
    """Return the seconds since the last change in an attempt's folder."""
    return time.time() - max(path.lstat().st_mtime for path in (attempt, *attempt.iterdir()))


def is_alive(process: ProcessRecord, heartbeat_s: float) -> bool:
    """Return whether a process whose last heartbeat was `heartbeat_s` ago may still be running."""
    if is_on_this_host(process):
        return bool(process_start_time(process["pid"]) == process["started"])
    return heartbeat_s < LEASE_S


@dataclass(frozen=True, slots=True)
class Lease:
    """The exclusive right to control a run, as long as no later generation exists."""

    folder: Path
    generation: int
    release_file: Path
    """The record of the release, which takes the place of the lease file: a full disk can still rename it."""

    def is_held(self) -> bool:
        """Return whether this is still the latest generation."""
        return _list_generations(self.folder)[-1:] == [self.generation]

    def check(self) -> None:
        """Raise `LeaseLost` if another controller has taken over: then this one must not write any more.

        Raises `RunFolderError` if the run folder is gone.
        """
        if not self.folder.is_dir():
            raise RunFolderError(
                f"{self.folder.parent} was deleted or moved during the run; move it back and continue with "
                "`ddm resume`, or start again with `ddm run`"
            )
        if not self.is_held():
            raise LeaseLost(
                f"another controller has taken over {self.folder.parent}, as this one gave no heartbeat; "
                "this one stops without writing"
            )

    def beat(self) -> None:
        """Renew the heartbeat."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(_lease_file(self.folder, self.generation))

    def release(self) -> None:
        """Free the lease; the file stays, so that its generation is never used again."""
        if self.is_held():
            self.release_file.replace(_lease_file(self.folder, self.generation))


@contextlib.contextmanager
def hold_lease(run: RunFolder) -> Iterator[Lease]:
    """Hold the run's lease while the block lasts, and create the run folder if it is missing.

    Raises `RunIsLocked`, which names the other controller, if that may still be running.
    """
    lease = _acquire(run)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(lease, ended), daemon=True, name="lease")
    heartbeat.start()
    try:
        yield lease
    finally:
        ended.set()
        heartbeat.join()
        lease.release()


def _acquire(run: RunFolder) -> Lease:
    """Create the next generation; raises `RunIsLocked` if the holder of the present one may be alive."""
    folder = run.controllers
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        latest, other = _read_latest(folder)
        if other is not None and other.is_alive:
            raise RunIsLocked(
                f"{run.root} is run by {other} (heartbeat {other.age_s:.0f} s ago); "
                f"wait for it, or stop it with `ddm stop {run.root}`"
            )
        generation = latest + 1
        release_file = folder / f".{generation}.{secrets.token_hex(4)}"
        write_record(release_file, this_process() | {"released": True})
        # Another controller may create the generation first, or even a later one after an old first look.
        if _create(folder, generation) and _list_generations(folder)[-1] == generation:
            _remove_old_files(folder, generation)
            return Lease(folder, generation, release_file)
        release_file.unlink(missing_ok=True)


def _remove_old_files(folder: Path, generation: int) -> None:
    """Delete lease files of long ago, and records of releases that a killed controller has not used."""
    for old in _list_generations(folder):
        if old <= generation - KEPT_GENERATIONS:
            _lease_file(folder, old).unlink(missing_ok=True)
    for path in folder.glob(".*"):
        match = RELEASE_FILE.fullmatch(path.name)
        if match and int(match[1]) < generation:
            path.unlink(missing_ok=True)


def _create(folder: Path, generation: int) -> bool:
    """Create a generation with this process in it; return False if another process has created it."""
    content = with_checksum(this_process()).encode()
    return create_once(_lease_file(folder, generation), content, folder / f".{secrets.token_hex(8)}")


def _lease_file(folder: Path, generation: int) -> Path:
    return folder / f"{generation}.json"


def _list_generations(folder: Path) -> list[int]:
    """Return the generations in the folder, the present one last."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    return sorted(
        int(entry.name[:-5])
        for entry in entries
        if GENERATION.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
    )


def _read(path: Path) -> ProcessRecord | None:
    """Return the content of a lease file; None if it is incomplete or damaged."""
    try:
        return read_record(ProcessRecord, path)
    except UnfinishedArtifact:
        raise FileNotFoundError(path) from None
    except ArtifactError:
        return None


def _send_heartbeats(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        lease.beat()
