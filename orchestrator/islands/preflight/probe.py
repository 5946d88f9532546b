"""`python -m orchestrator.islands.preflight.probe --storage URL --name NAME`: an island's report on itself, as a job.

The answer is one line of JSON in the job's log, so that it arrives also if the storage fails.
"""

import argparse
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.islands.storage.storage import Storage, StorageError

PROBE_BYTES = 4 * 2**20
"""Sent and fetched again for the bandwidth."""

MARKER = "ddm-probe "
"""Begins the line of the answer, among whatever else a job prints."""

MARKER_TEXT = "greeting.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What `ddm islands check` asks of an island from inside."""

    time: float
    """The end of the probe, in seconds since the epoch."""
    python: str
    torch: str
    """Empty if it is not installed."""
    project: str
    """Version of the code that runs there, with its content hash."""
    storage_error: str = ""
    """Empty if the storage can be used from there, and is the one that the controller writes to."""
    write_mb_s: float = 0.0
    read_mb_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpeed:
    """Bandwidth to a storage."""

    write_mb_s: float
    read_mb_s: float


def try_storage(storage: Storage, name: str) -> StorageSpeed:
    """Write, read, refuse to create twice, send and fetch a folder below `name`; raises `StorageError`."""
    try:
        _try_values(storage, f"{name}/value.json")
        return _try_folder(storage, f"{name}/folder")
    finally:
        storage.delete(name)


def _try_values(storage: Storage, name: str) -> None:
    value = {"nonce": secrets.token_hex(8)}
    if not storage.create_json(name, value):
        raise StorageError(f"{storage.url} says that {name} exists, which nobody has written; use another storage")
    if storage.create_json(name, {"nonce": "another"}) or storage.get_json(name) != value:
        raise StorageError(
            f"{storage.url} lets two writers create the same file (conditional put), so that two attempts could not be "
            "told apart; use a storage that knows `If-None-Match`"
        )


def _try_folder(storage: Storage, name: str) -> StorageSpeed:
    with tempfile.TemporaryDirectory(prefix="ddm-trial-") as temporary:
        sent, fetched = Path(temporary, "sent"), Path(temporary, "fetched")
        sent.mkdir()
        (sent / "content").write_bytes(os.urandom(PROBE_BYTES))
        started = time.perf_counter()
        storage.put_tree(sent, name)
        written = time.perf_counter()
        storage.get_tree(name, fetched)
        read = time.perf_counter()
    megabytes = PROBE_BYTES / 1e6
    return StorageSpeed(write_mb_s=megabytes / (written - started), read_mb_s=megabytes / (read - written))


def write_marker(storage: Storage, name: str) -> None:
    """Leave something that the island must find, if its storage is the same one."""
    storage.put_json(f"{name}/{MARKER_TEXT}", {"from": "the controller"})


def probe_report(storage: Storage, name: str) -> ProbeReport:
    """Everything that can be said without torch being imported."""
    said = ProbeReport(
        time=time.time(),
        python=platform.python_version(),
        torch=_version("torch"),
        project=_version("decentralized-diffusion"),
    )
    try:
        if storage.get_json(f"{name}/{MARKER_TEXT}") is None:
            return replace(
                said, storage_error=f"{storage.url} is another place there than here; both must reach one storage"
            )
        speed = try_storage(storage, f"{name}/there")
        return replace(said, **asdict(speed), time=time.time())
    except StorageError as error:
        return replace(said, storage_error=str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer on standard output."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.islands.preflight.probe")
    parser.add_argument("--storage", required=True, help="the island's storage")
    parser.add_argument("--options", default="{}", help="options of its file system, as JSON")
    parser.add_argument("--name", required=True, help="where in the storage to try it")
    given = parser.parse_args(arguments)
    said = asdict(probe_report(Storage(given.storage, json.loads(given.options)), given.name))
    sys.stdout.write(f"{MARKER}{json.dumps(said)}\n")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
