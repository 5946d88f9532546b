"""Report on an island from a job there: `python -m orchestrator.islands.preflight.probe --storage URL --name NAME`.

The report is one line of JSON in the job's log, so it arrives even if the storage fails.
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
"""Size of the file that is sent and fetched to measure the bandwidth."""

REPORT_PREFIX = "ddm-probe "
"""Start of the line with the report, among all other lines that a job prints."""

MARKER = "marker.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Versions, clock and storage of an island, as a job there observes them."""

    time: float
    """The end of the probe, in seconds since the epoch."""
    python: str
    torch: str
    """Empty if it is not installed."""
    project: str
    """Version of this project's code there, with its content hash."""
    storage_error: str = ""
    """Empty if the island can use the storage, and it is the one that the controller writes to."""
    write_mb_s: float = 0.0
    read_mb_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpeed:
    """Bandwidth to a storage."""

    write_mb_s: float
    read_mb_s: float


def try_storage(storage: Storage, name: str) -> StorageSpeed:
    """Write, read, create twice, send and fetch a folder below `name`; raise `StorageError` if any step fails."""
    try:
        _try_values(storage, f"{name}/value.json")
        return _try_folder(storage, f"{name}/folder")
    finally:
        storage.delete(name)


def _try_values(storage: Storage, name: str) -> None:
    value = {"nonce": secrets.token_hex(8)}
    if not storage.create_json(name, value):
        raise StorageError(f"{storage.url} reports that {name} exists, which nothing has written; use another storage")
    if storage.create_json(name, {"nonce": "another"}) or storage.get_json(name) != value:
        raise StorageError(
            f"{storage.url} lets two writers create the same file, so two attempts could both own a stage; use a "
            "storage with conditional put (`If-None-Match`)"
        )


def _try_folder(storage: Storage, name: str) -> StorageSpeed:
    with tempfile.TemporaryDirectory(prefix="ddm-trial-") as temporary:
        source, target = Path(temporary, "source"), Path(temporary, "target")
        source.mkdir()
        (source / "content").write_bytes(os.urandom(PROBE_BYTES))
        started = time.perf_counter()
        storage.put_tree(source, name)
        written = time.perf_counter()
        storage.get_tree(name, target)
        read = time.perf_counter()
    megabytes = PROBE_BYTES / 1e6
    return StorageSpeed(write_mb_s=megabytes / (written - started), read_mb_s=megabytes / (read - written))


def write_marker(storage: Storage, name: str) -> None:
    """Write a marker that the island reads, if its storage is the same one."""
    storage.put_json(f"{name}/{MARKER}", {"from": "the controller"})


def build_report(storage: Storage, name: str) -> ProbeReport:
    """Return the report of this node, without importing torch."""
    report = ProbeReport(
        time=time.time(),
        python=platform.python_version(),
        torch=_get_version("torch"),
        project=_get_version("decentralized-diffusion"),
    )
    try:
        if storage.get_json(f"{name}/{MARKER}") is None:
            error = f"{storage.url} is another place on the island than on the controller; both must reach one storage"
            return replace(report, storage_error=error)
        speed = try_storage(storage, f"{name}/remote")
        return replace(report, **asdict(speed), time=time.time())
    except StorageError as error:
        return replace(report, storage_error=str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report on standard output."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.islands.preflight.probe")
    parser.add_argument("--storage", required=True, help="URL of the island's storage")
    parser.add_argument("--options", default="{}", help="options of the storage's driver, as JSON")
    parser.add_argument("--name", required=True, help="name in the storage below which to write")
    options = parser.parse_args(arguments)
    report = asdict(build_report(Storage(options.storage, json.loads(options.options)), options.name))
    sys.stdout.write(f"{REPORT_PREFIX}{json.dumps(report)}\n")
    return 0


def _get_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
