"""Whatever lies where `ddm` is called, our code is imported: by every kind of process that is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.islands.local.clusters import LocalIslands, build_overrides
from orchestrator.islands.local.ray_head import Head

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

DDM = Path(sys.executable).with_name("ddm")

FOLDERS = ("artifacts", "ddm", "ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator", "wandb")

MODULES = (
    "ddm_core",
    "data_partition",
    "experts",
    "router",
    "ensemble",
    "orchestrator",
    "torch",
    "numpy",
    "ray",
    "six",
)

DIGITS = (
    "experiment=digits",
    "data.limit=300",
    "expert.training.steps=20",
    "router.training.steps=20",
    "scores=quick",
    "scores.num_samples=64",
    "ensemble.steps=2",
    "monolith=false",
    "partition.num_experts=2",
    "wandb.mode=disabled",
)


def fill_with_packages(folder: Path, names=FOLDERS) -> Path:
    """Create packages with names of ours; `router` and others without code, as a user's folders are."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).mkdir()
        if number % 2:
            (folder / name / "__init__.py").write_text("x = 1\n")
    return folder


def fill_with_modules(folder: Path, names=MODULES) -> Path:
    """Create modules that end whoever imports them."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemError('{name}.py of the working folder was imported')\n")
    return folder


def call_ddm(folder: Path, *arguments: str, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [DDM, *arguments],
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("fill", [fill_with_packages, fill_with_modules])
def test_workers_and_groups_of_the_embedded_cluster(fill, tmp_path):
    folder = fill(tmp_path / "here")
    call_ddm(folder, "run", *DIGITS, "compute=ray_local", "compute.cpus=2", "compute.stages.expert.workers=2")
    assert (folder / "runs" / "digits" / "report.html").is_file()


def test_run_folder_as_working_folder(tmp_path):
    call_ddm(tmp_path, "run", *DIGITS, "folder=run")
    call_ddm(tmp_path / "run", "run", *DIGITS, "folder=.", "router.training.steps=21", "--replace")


def test_trials_of_a_sweep(tmp_path):
    folder = fill_with_modules(tmp_path / "here")
    call_ddm(folder, "run", "-m", *DIGITS, "seed=1,2", "compute=ray_local", "hydra/launcher=ddm_ray", "compute.cpus=2")
    assert len(list(folder.glob("runs/**/report.html"))) == 2


def test_slurm_jobs(tmp_path):
    folder = fill_with_modules(tmp_path / "here")
    call_ddm(folder, "run", *DIGITS, "compute=slurm", "+compute.slurm.cluster=local")
    assert (folder / "runs" / "digits" / "report.html").is_file()


def test_jobs_and_submitted_controllers_of_a_foreign_cluster(tmp_path, monkeypatch):
    """The Ray cluster was started by other means, in a folder with packages of our names."""
    here, there = fill_with_modules(tmp_path / "here"), fill_with_modules(tmp_path / "there", MODULES[:6])
    monkeypatch.setattr(Head, "working_directory", there)
    with LocalIslands(tmp_path / "islands", count=1, cpus=2, environment={"PYTHONSAFEPATH": ""}) as islands:
        overrides = build_overrides(islands.configs, in_default_folder=False)
        address = islands.configs["island_1"].address
        overrides += [f"++compute.islands.island_1.address={address}"]
        call_ddm(here, "run", *DIGITS, *overrides, "compute.stages.expert.workers=2")
        assert (here / "runs" / "digits" / "report.html").is_file()
        token = islands.configs["island_1"].token_file
        where = (f"--address={address}", f"--token-file={token}")
        call_ddm(here, "submit", *DIGITS, "compute=ray_local", f"folder={tmp_path / 'submitted'}", *where, "--wait")
        call_ddm(here, "logs", str(tmp_path / "submitted"))
