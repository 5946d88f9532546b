"""A full or read-only disk is an error with a name and a way out, within seconds; nothing is half-written or lost.

The disks are real: small file systems in memory, which only root may mount.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from ddm_core.artifacts import files_in, read_manifest, save_arrays, verify, write_json
from orchestrator.errors import OrchestratorError, RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.disk_errors import explain_disk_error
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import execute
from tests.laws.conftest import tiny_config, walk
from tests.laws.test_corruption import job, stage_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")


@dataclass(frozen=True)
class Disk:
    """A file system of its own."""

    path: Path

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def fill(self, free_bytes: int = 0) -> Path:
        """Write a file that leaves so much free."""
        filler = self.path / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.path).free - free_bytes)
        return filler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "ddm-test", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def left_behind(out: Path) -> list[str]:
    """What lies in the place of artifacts, and half-written files anywhere."""
    hidden = [str(path) for path in out.rglob(".*")]
    return hidden + [path.name for path in out.iterdir() if path.name != "work"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "free_kb"),
    [
        ("dataset", 24),
        ("codec", 8),
        ("features", 16),
        ("partition", 24),
        ("router", 24),
        ("expert", 24),
        ("expert", 160),
        ("ensemble", 24),
        ("score", 24),
    ],
)
def test_a_stage_on_a_full_disk_is_named_leaves_nothing_and_works_once_there_is_room(tiny_run, disk, kind, free_kb):
    run, out = RunFolder(tiny_run), disk.path / "out"
    stage = stage_of(tiny_run, kind)
    first, second = job(run, stage, out), job(run, stage, out, attempt=2)
    filler, began = disk.fill(free_kb * 1024), time.monotonic()
    outcome = execute(first)
    assert (outcome.state, outcome.transient) == ("failed", True), outcome.error
    assert outcome.error.startswith("DiskFull: ") and str(out) in outcome.error
    assert "MB free now; make room" in outcome.error and time.monotonic() - began < 10
    assert left_behind(out) == []
    filler.unlink()
    assert execute(second).state == "finished"
    verify(out / stage.folder_name)
    assert read_manifest(out / stage.folder_name).checksums == read_manifest(run.artifact(stage)).checksums


@pytest.mark.slow
def test_a_run_on_a_full_disk_is_named_and_goes_on_to_the_same_bytes(tiny_run, disk):
    folder = disk.path / "run"
    filler = disk.fill(1_500_000)
    with pytest.raises(OrchestratorError, match=r"DiskFull: .* MB free now; make room"):
        walk(folder)
    filler.unlink()
    for path in folder.glob("artifacts/*"):
        verify(path)
    walk(folder)
    for stage in build_graph(tiny_config(folder)):
        written = read_manifest(RunFolder(folder).artifact(stage)).checksums
        assert written == read_manifest(RunFolder(tiny_run).artifact(stage)).checksums


def test_a_run_folder_on_a_disk_without_any_room_is_named(disk):
    disk.fill()
    with pytest.raises(RunFolderError, match="DiskFull: .* has 0.0 MB free now"):
        walk(disk.path / "run")


@pytest.mark.slow
def test_a_run_folder_on_a_read_only_disk_is_named(tiny_run, disk):
    shutil.copytree(tiny_run, disk.path / "run")
    before = {path: path.read_bytes() for path in files_in(disk.path / "run")}
    disk.remount("ro")
    began = time.monotonic()
    with pytest.raises(RunFolderError, match="ReadOnlyDisk: .*mount it writable"):
        walk(disk.path / "run")
    with pytest.raises(RunFolderError, match="ReadOnlyDisk"):
        walk(disk.path / "another")
    assert time.monotonic() - began < 5
    assert {path: path.read_bytes() for path in files_in(disk.path / "run")} == before


@pytest.mark.slow
def test_a_stage_on_a_read_only_disk_says_so_without_raising(tiny_run, disk):
    made = job(RunFolder(tiny_run), stage_of(tiny_run, "codec"), disk.path / "out")
    disk.remount("ro")
    outcome = execute(replace(made, scratch=str(disk.path / "other" / "work" / "state")))
    assert outcome.state == "failed" and outcome.error.startswith("ReadOnlyDisk: ")


def test_an_event_that_does_not_fit_leaves_the_journal_whole(disk):
    run = RunFolder(disk.path)
    while not run.journal.exists() or run.journal.stat().st_size < 4050:
        run.record("submitted", stage="x")
    filler, before = disk.fill(), run.events()
    with pytest.raises(OSError, match="No space left"):
        run.record("finished", error="y" * 200)
    assert run.events() == before
    filler.unlink()
    run.record("finished")
    assert [event["event"] for event in run.events()] == ["submitted"] * len(before) + ["finished"]


def test_a_full_disk_is_known_by_whatever_library_runs_into_it(disk):
    for write in (
        lambda: np.save(disk.path / "a.npy", np.zeros(10**7)),
        lambda: np.save(disk.path / "a.npy", np.zeros(10**6 + 10**5)),
        lambda: save_arrays(disk.path / "b.safetensors", {"b": np.zeros(10**7)}),
        lambda: write_json(disk.path / "c.json", "c" * 10**7),
    ):
        with pytest.raises((OSError, SafetensorError)) as caught:
            write()
        assert explain_disk_error(caught.value, disk.path).startswith("DiskFull: ")
        assert not list(disk.path.glob(".*")) and not (disk.path / "c.json").exists()


def test_an_array_that_does_not_fit_is_an_error_and_not_the_end_of_the_process(disk):
    code = (
        "import errno, sys; from pathlib import Path; from ddm_core.memmaps import new_array\n"
        "try: new_array(Path(sys.argv[1]), 'float32', (10**7,))[:] = 1\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(disk.path / "a.npy")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "ENOSPC\n"), ran
