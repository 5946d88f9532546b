"""The wheel: the same code gives the same bytes, another byte another name, and pip installs it without an index."""

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
    """A small copy of the project from which the wheel is built."""
    folder = tmp_path / "checkout"
    for name in (*PACKAGES, "cluster_configs/data"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"NAME = {name!r}\n")
    (folder / "cluster_configs" / "data" / "digits.yaml").write_text("source: digits\n")
    (folder / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    monkeypatch.setattr(wheels, "_folder", lambda package: folder / package)
    return folder


def entries(path):
    return zipfile.ZipFile(path).infolist()


def test_the_same_code_gives_the_same_bytes(checkout, tmp_path):
    first, second = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b")
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())
    assert {(entry.date_time, entry.external_attr >> 16) for entry in entries(first)} == {(EPOCH, 0o644)}


def test_what_python_leaves_behind_changes_nothing(checkout, tmp_path):
    before = build_wheel(tmp_path / "a")
    (checkout / "experts" / "__pycache__").mkdir()
    (checkout / "experts" / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"compiled")
    (checkout / "experts" / "__pycache__" / "train.cpython-311.pyc.140").write_bytes(b"half compiled")
    (checkout / "experts" / ".train.py.swp").write_bytes(b"edited")
    (checkout / "experts" / "train.py~").write_bytes(b"edited")
    assert build_wheel(tmp_path / "b").read_bytes() == before.read_bytes()


@pytest.mark.parametrize("changed", ["ddm_core/__init__.py", "router/__init__.py", "cluster_configs/data/digits.yaml"])
def test_one_changed_byte_gives_another_name(checkout, tmp_path, changed):
    before = build_wheel(tmp_path / "a")
    (checkout / changed).write_text((checkout / changed).read_text() + "#")
    assert build_wheel(tmp_path / "b").name != before.name


def test_a_moved_file_gives_another_name(checkout, tmp_path):
    before = build_wheel(tmp_path / "a")
    (checkout / "router" / "__init__.py").rename(checkout / "router" / "other.py")
    assert build_wheel(tmp_path / "b").name != before.name


def test_the_name_has_the_projects_version_and_the_hash(checkout, tmp_path):
    name, release, *_ = build_wheel(tmp_path).name.split("-")
    public, _, local = release.partition("+")
    assert (name, public, len(local)) == ("decentralized_diffusion", "1.2.3", 12)


def test_the_record_names_every_file(wheel):
    archive = zipfile.ZipFile(wheel)
    record = next(name for name in archive.namelist() if name.endswith("/RECORD"))
    listed = [row[0] for row in csv.reader(archive.read(record).decode().splitlines())]
    assert sorted(listed) == sorted(archive.namelist())


def test_the_wheel_has_code_and_data_and_nothing_else(wheel):
    found = [entry.filename for entry in entries(wheel)]
    for needed in ("ddm_core/artifacts.py", "orchestrator/islands/worker.py", "cluster_configs/experiment/digits.yaml"):
        assert needed in found
    assert [name for name in found if name.startswith("data_partition/fashion/") and name.endswith(".tar.gz")]
    assert [name for name in found if name.endswith(".html")]
    assert not [name for name in found if "__pycache__" in name or name.startswith(("tests/", "benchmarks/"))]
    metadata = next(name for name in found if name.endswith("/METADATA"))
    assert b"Requires-Dist" not in zipfile.ZipFile(wheel).read(metadata)


@pytest.mark.slow
def test_pip_installs_it_and_it_builds_itself_again(wheel, tmp_path):
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path, timeout=120)
    code = (
        "from pathlib import Path; import orchestrator; from orchestrator.islands.wheel import build_wheel\n"
        "print(orchestrator.__file__); print(build_wheel(Path('again')).name)"
    )
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    where, name = ran.stdout.splitlines()
    assert Path(where).is_relative_to(target) and name == wheel.name
    assert (tmp_path / "again" / name).read_bytes() == wheel.read_bytes()
