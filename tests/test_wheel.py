"""The wheel alone, in an empty environment and from another folder, can run the whole pipeline."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def call(*words: object, folder: Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=folder, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, folder=folder)
    return next(folder.glob("*.whl"))


def test_wheel_has_data_configuration_and_licenses(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "cluster_configs/experiment/demo.yaml",
        "orchestrator/ui/templates/report.html",
        "orchestrator/ui/templates/sections/film.html",
        "orchestrator/ui/static/ui.js",
        "ddm_core/artifacts.py",
    ):
        assert needed in names
    assert [name for name in names if name.startswith("data_partition/fashion/") and name.endswith(".tar.gz")]
    for license_name in ("LICENSE.fashion-mnist", "htmx.LICENSE", "uPlot.LICENSE"):
        assert [name for name in names if name.endswith(license_name)]
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_image_runs_as_a_user_and_installs_extras_that_exist():
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)", text, flags=re.MULTILINE)[-1] != "root"
    extras = set(re.search(r"whl\)\[(.*)\]", text)[1].split(","))
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.integration
def test_wheel_runs_the_pipeline_from_another_folder(wheel, tmp_path):
    """Install by the image's own steps, in an empty environment instead of its base image."""
    call(sys.executable, "-m", "venv", "env", folder=tmp_path)
    binaries = tmp_path / "env" / "bin"
    shutil.copy(ROOT / "constraints.txt", wheel.parent)
    step = re.search(r"RUN (index=.*?)\nRUN", (ROOT / "Dockerfile").read_text(), flags=re.DOTALL)[1]
    step = step.replace("\\\n", "").replace("/wheels", str(wheel.parent)).replace("pip install", "pip install --quiet")
    call("env", f"PATH={binaries}:{os.environ['PATH']}", "TORCH=index", "sh", "-c", step, folder=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    call(binaries / "ddm", "run", "experiment=digits", "compute=ray_local", "wandb.mode=disabled", folder=elsewhere)
    assert (elsewhere / "runs" / "digits" / "report.html").is_file()
