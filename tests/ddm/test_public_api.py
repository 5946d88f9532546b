"""`import ddm`: the public names, that importing them is cheap, and that the documents match."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ddm
from tests.orchestrator.cli.test_app import TINY

ROOT = Path(ddm.__file__).parents[1]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_public_names_are_sorted_and_complete():
    assert ddm.__all__ == sorted(ddm.__all__)
    assert set(ddm.__all__) == set(ddm._MODULES)


@pytest.mark.parametrize("name", ddm.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(ddm, name)
    assert value is getattr(import_module(ddm._MODULES[name]), name)
    assert (value.__doc__ or "").strip()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="DDMPipeline"):
        ddm.pipelines  # noqa: B018


def test_import_loads_nothing_heavy():
    heavy = ("torch", "ray", "numpy", "diffusers", "hydra", "pydantic")
    code = f"import sys, ddm; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize("name", ["ArtifactError", "ConfigError", "DataError", "EnsembleError", "OrchestratorError"])
def test_errors_share_one_root(name):
    assert issubclass(getattr(ddm, name), ddm.DDMError)


def test_every_error_of_the_project_has_the_root():
    rooms = ("ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator")
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            source = path.read_text()
            if "Error)" not in source and "Exception)" not in source:
                continue
            if any(name in source for name in ("import ray", "import hydra", "import optuna", "import submitit")):
                continue
            if path.name in ("__main__.py",):
                continue
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
            for value in vars(module).values():
                is_ours = isinstance(value, type) and value.__module__ == module.__name__
                if is_ours and issubclass(value, Exception) and value.__name__.endswith("Error"):
                    assert issubclass(value, ddm.DDMError), f"{module.__name__}.{value.__name__}"


def test_api_page_is_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate_api
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert generate_api.PAGE.read_text() == generate_api.render(), "run `make docs`"


@pytest.mark.slow
def test_quickstart_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names: dict[str, object] = {}
    shorter = "".join(f", {setting!r}" for setting in TINY[1:])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace('"compute=inline"', f'"compute=inline"{shorter}')
            exec(source, names)  # noqa: S102 - the cells of our own notebook
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
