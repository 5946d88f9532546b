"""Private folders of embedded Ray clusters: mode, length, and the removal of what dead runs left, nothing else."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.backends import ray_folder
from orchestrator.backends.ray_folder import private_folder, remove_abandoned, short_temporary_folder
from orchestrator.errors import OrchestratorError


@pytest.fixture
def parent(monkeypatch):
    """Yield a short empty folder in which private folders are created."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="d") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_private_folder_is_locked_until_its_end(parent):
    with private_folder() as folder:
        assert folder.parent == parent and folder.stat().st_mode & 0o777 == 0o700
        remove_abandoned(parent)
        with private_folder() as other:
            assert other != folder and folder.is_dir()
    assert list(parent.iterdir()) == []


def test_folder_and_processes_of_killed_owner_are_removed(parent):
    code = (
        "import os, subprocess, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from orchestrator.backends.ray_folder import private_folder\n"
        "from orchestrator.run.marked_processes import MARK\n"
        "with private_folder() as folder:\n"
        "    child = subprocess.Popen(['sleep', '900'], env={MARK: str(folder)}, stdout=-3, stderr=-3)\n"
        "    print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    owner = subprocess.run([sys.executable, "-c", code, str(parent)], capture_output=True, text=True)
    assert owner.returncode == -signal.SIGKILL and len(list(parent.iterdir())) == 1
    with private_folder() as folder:
        assert list(parent.iterdir()) == [folder]
        stat = Path(f"/proc/{owner.stdout.strip()}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_nothing_of_another_form_or_through_a_link_is_removed(parent):
    form = f"ddm-ray-{os.getuid()}-"
    (parent / "elsewhere").mkdir(mode=0o700)
    kept = [f"{form}0123456", f"{form}012345678", f"{form}0123456G", f"ddm-ray-{os.getuid() + 1}-01234567", "ray"]
    for name in kept:
        (parent / name).mkdir(mode=0o700)
    (parent / f"{form}aaaaaaaa").mkdir(mode=0o700)
    (parent / f"{form}aaaaaaaa").chmod(0o755)
    (parent / f"{form}bbbbbbbb").symlink_to(parent / "elsewhere")
    (parent / f"{form}cccccccc").write_text("a file")
    before = sorted(parent.iterdir())
    (parent / f"{form}dddddddd").mkdir(mode=0o700)
    remove_abandoned(parent)
    assert sorted(parent.iterdir()) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_folder_of_another_owner_is_kept(parent):
    foreign = parent / f"ddm-ray-{os.getuid()}-01234567"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 1, 1)
    remove_abandoned(parent)
    assert foreign.is_dir()


def test_folder_deleted_before_its_lock_is_created_again(parent, monkeypatch):
    """Another process may look between the creation of a folder and its lock, and take it for abandoned."""
    lock, calls = ray_folder._lock, []

    def lock_late(folder, *, wait):
        if wait and not calls:
            calls.append(folder)
            remove_abandoned(parent)
        return lock(folder, wait=wait)

    monkeypatch.setattr(ray_folder, "_lock", lock_late)
    with private_folder() as folder:
        assert folder.is_dir() and not calls[0].exists() and calls[0] != folder


def test_long_temporary_folder_is_replaced(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 115)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert str(short_temporary_folder()) in ray_folder.SHORT_FOLDERS
    monkeypatch.setattr(ray_folder, "SHORT_FOLDERS", (str(deep),))
    with pytest.raises(OrchestratorError, match="at most .* bytes.*set TMPDIR"):
        short_temporary_folder()
