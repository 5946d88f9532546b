"""Wheel: the same code produces the same bytes, a changed byte a new name, and pip installs it without an index."""

import csv
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orchestrator.islands import wheel as wheels
from orchestrator.islands.wheel import EPOCH, PACKAGES, build_wheel

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Create a small copy of the project from which the wheel is built."""
    folder = tmp_path / "checkout"
    for name in (*PACKAGES, "cluster_configs/data"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"NAME = {name!r}\n")
    (folder / "cluster_configs" / "data" / "digits.yaml").write_text("source: digits\n")
    (folder / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    monkeypatch.setattr(wheels, "_find_package_folder", lambda package: folder / package)
    return folder


def entries(path):
    return zipfile.ZipFile(path).infolist()


def test_wheel_of_same_code_is_byte_identical(checkout, tmp_path):
    first, second = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b")
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())
    assert {(entry.date_time, entry.external_attr >> 16) for entry in entries(first)} == {(EPOCH, 0o644)}


def test_wheel_with_generated_files_present_is_unchanged(checkout, tmp_path):
    before = build_wheel(tmp_path / "a")
    (checkout / "experts" / "__pycache__").mkdir()
    (checkout / "experts" / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"compiled")
    (checkout / "experts" / "__pycache__" / "train.cpython-311.pyc.140").write_bytes(b"half compiled")
    (checkout / "experts" / ".train.py.swp").write_bytes(b"edited")
    (checkout / "experts" / "train.py~").write_bytes(b"edited")
    assert build_wheel(tmp_path / "b").read_bytes() == before.read_bytes()


@pytest.mark.parametrize("changed", ["ddm_core/__init__.py", "router/__init__.py", "cluster_configs/data/digits.yaml"])
def test_wheel_after_one_changed_byte_has_another_name(checkout, tmp_path, changed):
    before = build_wheel(tmp_path / "a")
    (checkout / changed).write_text((checkout / changed).read_text() + "#")
    assert build_wheel(tmp_path / "b").name != before.name


def test_wheel_after_moved_file_has_another_name(checkout, tmp_path):
    before = build_wheel(tmp_path / "a")
    (checkout / "router" / "__init__.py").rename(checkout / "router" / "other.py")
    assert build_wheel(tmp_path / "b").name != before.name


def test_wheel_name_has_version_and_content_hash(checkout, tmp_path):
    name, release, *_ = build_wheel(tmp_path).name.split("-")
    public, _, local = release.partition("+")
    assert (name, public, len(local)) == ("decentralized_diffusion", "1.2.3", 12)


def test_wheel_record_lists_every_file(wheel):
    archive = zipfile.ZipFile(wheel)
    record = next(name for name in archive.namelist() if name.endswith("/RECORD"))
    paths = [row[0] for row in csv.reader(archive.read(record).decode().splitlines())]
    assert sorted(paths) == sorted(archive.namelist())


def test_wheel_contains_only_code_and_data(wheel):
    names = [entry.filename for entry in entries(wheel)]
    for required in (
        "ddm_core/artifacts.py",
        "orchestrator/islands/worker.py",
        "cluster_configs/experiment/digits.yaml",
    ):
        assert required in names
    assert [name for name in names if name.startswith("data_partition/fashion/") and name.endswith(".tar.gz")]
    assert [name for name in names if name.endswith(".html")]
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "benchmarks/"))]
    metadata = next(name for name in names if name.endswith("/METADATA"))
    assert b"Requires-Dist" not in zipfile.ZipFile(wheel).read(metadata)


@pytest.mark.integration
def test_installed_wheel_builds_itself_again(wheel, tmp_path):
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path, timeout=120)
    code = (
        "from pathlib import Path; import orchestrator; from orchestrator.islands.wheel import build_wheel\n"
        "print(orchestrator.__file__); print(build_wheel(Path('again')).name)"
    )
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    package, name = completed.stdout.splitlines()
    assert Path(package).is_relative_to(target) and name == wheel.name
    assert (tmp_path / "again" / name).read_bytes() == wheel.read_bytes()
