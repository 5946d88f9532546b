"""A full or read-only disk is an error with a name and a remedy, within seconds; no file is incomplete or lost.

The disks are real: small file systems in memory, which only root can mount.
"""

import logging
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

from ddm_core.artifacts import list_files, read_manifest, save_arrays, verify, write_json
from orchestrator.cli.sample import SamplingOptions, prepare_sampling
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.disk_errors import explain_disk_error
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import execute, logging_to
from tests.laws.conftest import run_tiny, tiny_config
from tests.laws.test_corruption import find_stage, job

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@dataclass(frozen=True)
class Disk:
    """A separate file system."""

    path: Path

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def fill(self, free_bytes: int = 0) -> Path:
        """Write a file that leaves `free_bytes` free."""
        filler = self.path / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.path).free - free_bytes)
        return filler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "ddm-test", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def leftovers(out: Path) -> list[str]:
    """Return the artifacts, and the incomplete files in all folders."""
    hidden = [str(path) for path in out.rglob(".*")]
    return hidden + [path.name for path in out.iterdir() if path.name != "work"]


def test_grid_on_a_full_disk_is_refused_first(disk):
    disk.fill(100 * 1024)
    with pytest.raises(ConfigError, match=r"needs a disk with 1 MB free, and .*disk has 0\.1; choose another file"):
        prepare_sampling(RunFolder(disk.path / "no run"), disk.path / "new" / "grid.png", SamplingOptions())
    assert not (disk.path / "new").exists()


@pytest.mark.integration
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
def test_stage_on_full_disk_fails_cleanly_and_retries(tiny_run, disk, kind, free_kb):
    run, out = RunFolder(tiny_run), disk.path / "out"
    stage = find_stage(tiny_run, kind)
    first, second = job(run, stage, out), job(run, stage, out, attempt=2)
    filler, started = disk.fill(free_kb * 1024), time.monotonic()
    outcome = execute(first)
    assert (outcome.state, outcome.transient) == ("failed", True), outcome.error
    assert outcome.error.startswith("DiskFull: ") and str(out) in outcome.error
    assert "MB free now; free some space" in outcome.error and time.monotonic() - started < 10
    assert leftovers(out) == []
    filler.unlink()
    assert execute(second).state == "finished"
    verify(out / stage.folder_name)
    assert read_manifest(out / stage.folder_name).checksums == read_manifest(run.artifact(stage)).checksums


@pytest.mark.integration
def test_run_on_full_disk_resumes_bit_identically(tiny_run, disk):
    folder = disk.path / "run"
    filler = disk.fill(1_500_000)
    with pytest.raises(OrchestratorError, match=r"DiskFull: .* MB free now; free some space"):
        run_tiny(folder)
    filler.unlink()
    for path in folder.glob("artifacts/*"):
        verify(path)
    run_tiny(folder)
    for stage in build_graph(tiny_config(folder)):
        checksums = read_manifest(RunFolder(folder).artifact(stage)).checksums
        assert checksums == read_manifest(RunFolder(tiny_run).artifact(stage)).checksums


def test_run_folder_on_full_disk_is_an_error(disk):
    disk.fill()
    with pytest.raises(RunFolderError, match="DiskFull: .* has 0.0 MB free now"):
        run_tiny(disk.path / "run")


@pytest.mark.integration
def test_run_folder_on_read_only_disk_is_an_error(tiny_run, disk):
    shutil.copytree(tiny_run, disk.path / "run")
    before = {path: path.read_bytes() for path in list_files(disk.path / "run")}
    disk.remount("ro")
    with pytest.raises(ConfigError, match="is read-only; make it writable"):
        run_tiny(disk.path / "run")
    with pytest.raises(ConfigError, match="is read-only"):
        run_tiny(disk.path / "another")
    assert {path: path.read_bytes() for path in list_files(disk.path / "run")} == before


@pytest.mark.integration
def test_stage_on_read_only_disk_returns_failure(tiny_run, disk):
    codec_job = job(RunFolder(tiny_run), find_stage(tiny_run, "codec"), disk.path / "out")
    disk.remount("ro")
    outcome = execute(replace(codec_job, scratch=str(disk.path / "other" / "work" / "state")))
    assert outcome.state == "failed" and outcome.error.startswith("ReadOnlyDisk: ")


def test_record_without_space_keeps_journal_intact(disk):
    run = RunFolder(disk.path)
    while not run.journal.exists() or run.journal.stat().st_size < 4000:
        run.record("submitted", stage="x")
    filler, before = disk.fill(), run.read_events()
    with pytest.raises(OSError, match="No space left"):
        run.record("finished", error="y" * 4096)  # a page: longer than what is left of the journal's last one
    assert run.read_events() == before
    filler.unlink()
    run.record("finished")
    assert [event["event"] for event in run.read_events()] == ["submitted"] * len(before) + ["finished"]


def test_log_on_full_disk_prints_nothing(disk, capsys):
    disk.fill()
    with logging_to(disk.path / "log.txt"):
        logging.getLogger("test").error("x" * 10_000)
    assert capsys.readouterr().err == ""


def test_full_disk_is_recognized_from_every_library(disk):
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


def test_array_on_full_disk_raises_instead_of_crash(disk):
    code = (
        "import errno, sys; from pathlib import Path; from ddm_core.files.memmaps import create_memmap\n"
        "try: create_memmap(Path(sys.argv[1]), 'float32', (10**7,))[:] = 1\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    process = subprocess.run([sys.executable, "-c", code, str(disk.path / "a.npy")], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "ENOSPC\n"), process
