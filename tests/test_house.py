"""The house: arrows point down, heavy libraries stay behind one door, and the papers say what is there."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator"]
DOORS = {
    "ray": {
        "orchestrator/backends/ray_tasks.py",
        "orchestrator/backends/ray_train.py",
        "orchestrator/islands/client.py",
        "orchestrator/pools/providers/local_node_provider.py",
    },
    "hydra": {
        "orchestrator/config/hydra_compose.py",
        "orchestrator/sweeps/hydra_entry.py",
        "orchestrator/sweeps/launcher.py",
        "orchestrator/sweeps/optuna_sweeper.py",
    },
    "submitit": {"orchestrator/backends/slurm.py"},
    "optuna": {"orchestrator/sweeps/study.py"},
    "fsspec": {"data_partition/shards/untrusted.py", "orchestrator/islands/storage/remote_store.py"},
    "wandb": {"orchestrator/reporting/wandb_tracker.py"},
    "matplotlib": {"orchestrator/reporting/charts.py"},
    "faiss": {"data_partition/clustering/kmeans.py"},
}
FORBIDDEN = {"pickle", "dill", "shelve", "marshal"}


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level names of every import, also those inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_climbs(path):
    room = path.relative_to(ROOT).parts[0]
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not imports(path) & above


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_stays_behind_its_door(library):
    found = {str(path.relative_to(ROOT)) for path in sources() if library in imports(path)}
    assert found == DOORS[library]


def test_nothing_pickles():
    assert not [path for path in sources() if imports(path) & FORBIDDEN]


def test_arrays_are_written_through_the_floor():
    found = [path for path in sources() if re.search(r"safetensors\.numpy import .*save", path.read_text())]
    assert found == [ROOT / "ddm_core" / "artifacts.py"]


def test_every_module_says_what_it_is():
    assert not [path for path in sources() if not ast.get_docstring(ast.parse(path.read_text()))]


def test_no_room_is_called_utils():
    assert not [path for path in sources() if "util" in path.stem]


def python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return ran.stdout


def test_the_configuration_imports_neither_torch_nor_ray():
    code = (
        "import sys, orchestrator.cli.app, orchestrator.config.schema, orchestrator.pipeline.graph\n"
        "print([name for name in ('torch', 'ray', 'hydra', 'wandb', 'diffusers') if name in sys.modules])"
    )
    assert python(code) == "[]\n"


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["plan", "experiment=demo"], ("torch", "ray", "wandb", "diffusers")),
        (["--help"], ("numpy", "pydantic", "hydra", "omegaconf", "torch")),
    ],
)
def test_a_command_that_answers_at_once_imports_nothing_heavy(words, heavy):
    code = (
        "import sys; from orchestrator.cli.app import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert python(code).endswith("[]\n")


def commands_in(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", path.read_text(), flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readmes_first_command_is_near_its_top():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(number for number, line in enumerate(lines, start=1) if line.startswith("make demo")) <= 25


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {command.split()[1] for command in commands_in(ROOT / "README.md") if command.startswith("make ")}
    assert used and used <= targets


def test_every_ddm_command_in_the_readme_exists():
    from orchestrator.cli.app import app

    known = {command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    used = {command.split()[1] for command in commands_in(ROOT / "README.md") if command.startswith("ddm ")}
    assert used and used <= known


def test_the_readme_composes():
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    table = re.findall(r"`((?:data|experiment)=[^`]+)`", (ROOT / "README.md").read_text())
    commands = [command for command in commands_in(ROOT / "README.md") if command.startswith("ddm run")]
    composed = 0
    for command in [*commands, *(f"ddm run {overrides}" for overrides in table)]:
        words = [word for word in shlex.split(command, comments=True)[2:] if word != "-m"]
        choices = [word.partition("=")[2].split(",") if re.search(r"=\d+,\d", word) else [""] for word in words]
        for chosen in itertools.product(*choices):
            overrides = [f"{w.partition('=')[0]}={c}" if c else w for w, c in zip(words, chosen, strict=True)]
            parse_config(compose(overrides))
            composed += 1
    assert composed >= 7


def test_links_in_the_papers_lead_somewhere():
    papers = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for paper in papers:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", paper.read_text()):
            assert (paper.parent / target).exists(), f"{paper.relative_to(ROOT)} -> {target}"
