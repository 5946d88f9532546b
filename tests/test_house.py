"""The structure: imports point down, heavy libraries have one importer, folders are small, and the documents match."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator", "ddm"]
IMPORTERS = {
    "ray": {
        "orchestrator/backends/ray_cluster.py",
        "orchestrator/backends/ray_data.py",
        "orchestrator/backends/ray_tasks.py",
        "orchestrator/backends/ray_train.py",
        "orchestrator/islands/client.py",
        "orchestrator/pools/providers/local_node_provider.py",
        "orchestrator/serving/deployments.py",
    },
    "hydra": {
        "orchestrator/config/hydra_compose.py",
        "orchestrator/sweeps/hydra_entry.py",
        "orchestrator/sweeps/launcher.py",
        "orchestrator/sweeps/optuna_sweeper.py",
    },
    "submitit": {"orchestrator/backends/slurm.py"},
    "optuna": {"orchestrator/sweeps/study.py"},
    "fsspec": {"data_partition/shards/urls.py", "orchestrator/islands/storage/remote_store.py"},
    "wandb": {"orchestrator/reporting/tracking/wandb_library.py"},
    "matplotlib": {"orchestrator/reporting/charts.py"},
    "faiss": {"data_partition/clustering/kmeans.py"},
}
FORBIDDEN = {"pickle", "dill", "shelve", "marshal"}


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level names of every import, also those inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not imports(path) & above


@pytest.mark.parametrize("library", IMPORTERS)
def test_heavy_library_has_its_importers_only(library):
    importers = {str(path.relative_to(ROOT)) for path in sources() if library in imports(path)}
    assert importers == IMPORTERS[library]


def test_pickle_is_never_imported():
    assert not [path for path in sources() if imports(path) & FORBIDDEN]


def test_arrays_are_written_by_artifacts_only():
    writers = [path for path in sources() if re.search(r"safetensors\.numpy import .*save", path.read_text())]
    assert writers == [ROOT / "ddm_core" / "artifacts.py"]


def test_every_module_has_a_docstring():
    assert not [path for path in sources() if not ast.get_docstring(ast.parse(path.read_text()))]


def test_no_file_is_called_utils():
    assert not [path for path in sources() if "util" in path.stem]


MAX_ENTRIES = 15
"""Entries of a folder, `__init__.py` not counted."""

PARENT_MODULES = {
    "data_partition": {"config", "errors", "assignment"},
    "ensemble": {
        "config",
        "ensemble",
        "membership",
        "multi_network_experts",
        "pipeline",
        "pipeline_folder",
        "routing",
        "solvers",
    },
    "ensemble.compression": {"config", "method"},
    "experts.networks.adapters": {"adapter"},
    "experts.training": {"flops", "latent_dataset"},
    "experts": {"codec", "condition", "config", "errors", "expert", "expert_model", "serialization", "types"},
    "orchestrator": {"config", "controller", "errors"},
    "orchestrator.islands": {"client", "token", "wheel"},
    "orchestrator.pools": {"config", "island_config", "shell", "yaml_text"},
    "router": {"config", "types"},
    "orchestrator.reporting": {"costs", "results"},
}
"""What a sub-folder may import from the folder around it: configuration, errors, and the room's nouns."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules() -> dict[str, set[str]]:
    """Every module of ours and the modules of ours that it imports, anywhere in its code."""
    known = {module_name(path) for path in sources()}
    graph = {}
    for path in sources():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                members = {f"{node.module}.{alias.name}" for alias in node.names} & known
                targets |= members or ({node.module} & known)
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names} & known
        graph[module_name(path)] = targets - {module_name(path)}
    return graph


def test_folders_have_few_entries():
    folders = {path.parent for path in sources()}
    sizes = {
        str(folder.relative_to(ROOT)): len([entry for entry in folder.iterdir() if not entry.name.startswith("__")])
        for folder in folders
    }
    assert {name: size for name, size in sizes.items() if size > MAX_ENTRIES} == {}


def test_imports_form_no_circle():
    graph = {module: set(targets) for module, targets in imported_modules().items()}
    while free := {module for module, targets in graph.items() if not targets}:
        graph = {module: targets - free for module, targets in graph.items() if module not in free}
    assert graph == {}


def test_sibling_folders_import_one_way():
    pairs = set()
    for module, targets in imported_modules().items():
        for target in targets:
            ours, theirs = module.split("."), target.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if depth and len(ours) > depth + 1 and len(theirs) > depth + 1:
                pairs.add((".".join(ours[: depth + 1]), ".".join(theirs[: depth + 1])))
    assert sorted((a, b) for a, b in pairs if a < b and (b, a) in pairs) == []


def test_sub_folders_import_only_nouns_of_their_parent():
    packages = {module_name(path.parent / "__init__.py") for path in sources()}
    wrong = []
    for module, targets in imported_modules().items():
        for target in targets:
            parent, _, leaf = target.rpartition(".")
            is_child = module.startswith(f"{parent}.") and module.count(".") > target.count(".")
            if is_child and target not in packages and leaf not in PARENT_MODULES.get(parent, set()):
                wrong.append(f"{module} -> {target}")
    assert wrong == []


def test_tests_mirror_the_folders():
    folders = {str(path.parent.relative_to(ROOT)) for path in sources()}
    tests = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {str(folder) for folder in tests} - folders == {".", "laws"}


def test_public_class_names_are_unique():
    places: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module_name(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


WORDS = {
    "say": r"\b(says?|said|spoken|speaks?|speaker)\b|(?<=_)(said|spoken)\b|\b(said|spoken)(?=_)",
    "tell": r"\b(tells?|told|untold)\b|(?<=_)told\b|\btold(?=_)",
    "ask": r"\b(asks?|asked)\b|(?<=_)asked\b|\basked(?=_)",
    "go on": r"\b(goes on|go on|went on)\b",
    "come to": r"\b(comes? to|came to)\b",
    "stand": r"\b(stands?|standing|stood)\b",
}
"""Words that networks and processes do not do; each at most once in 2,000 lines."""


@pytest.mark.parametrize("word", WORDS)
def test_code_uses_the_terms_of_the_field(word):
    text = "\n".join(path.read_text() for path in sources())
    assert 1000 * len(re.findall(WORDS[word], text, flags=re.IGNORECASE)) / text.count("\n") <= 0.5


def test_function_docstrings_open_with_a_verb():
    openings = [
        docstring.split()[0]
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node))
    ]
    assert openings.count("What") == 0
    assert openings.count("The") <= 0.05 * len(openings)


def test_test_names_are_short():
    names = [
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if len(name) > 60] == []


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_config_files_import_no_torch():
    modules = [module_name(path) for path in sources() if path.name in ("config.py", "schema.py", "compute.py")]
    code = f"import sys; from importlib import import_module; [import_module(name) for name in {modules!r}]\n"
    assert python(f"{code}print('torch' in sys.modules)") == "False\n"


def test_configuration_imports_neither_torch_nor_ray():
    code = (
        "import sys, orchestrator.cli.app, orchestrator.config.schema, orchestrator.pipeline.graph\n"
        "print([name for name in ('torch', 'ray', 'hydra', 'wandb', 'diffusers') if name in sys.modules])"
    )
    assert python(code) == "[]\n"


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["plan", "experiment=demo"], ("ray", "wandb", "sklearn")),
        (["--help"], ("numpy", "pydantic", "hydra", "omegaconf", "torch")),
    ],
)
def test_quick_command_imports_nothing_heavy(words, heavy):
    code = (
        "import sys; from orchestrator.cli.app import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert python(code).endswith("[]\n")


def commands_in(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", path.read_text(), flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def test_readme_first_command_is_near_the_top():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(number for number, line in enumerate(lines, start=1) if line.startswith("make demo")) <= 25


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {command.split()[1] for command in commands_in(ROOT / "README.md") if command.startswith("make ")}
    assert used and used <= targets


def test_readme_ddm_commands_exist():
    from orchestrator.cli.app import app

    known = {command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    used = {command.split()[1] for command in commands_in(ROOT / "README.md") if command.startswith("ddm ")}
    assert used and used <= known


def test_readme_overrides_compose():
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    table = re.findall(r"`((?:data|experiment)=[^`]+)`", (ROOT / "README.md").read_text())
    commands = [command for command in commands_in(ROOT / "README.md") if command.startswith("ddm run")]
    composed = 0
    for command in [*commands, *(f"ddm run {overrides}" for overrides in table)]:
        words = [word for word in shlex.split(command, comments=True)[2:] if word != "-m"]
        choices = [word.partition("=")[2].split(",") if re.search(r"=\d+,\d", word) else [""] for word in words]
        for values in itertools.product(*choices):
            overrides = [f"{w.partition('=')[0]}={c}" if c else w for w, c in zip(words, values, strict=True)]
            parse_config(compose(overrides))
            composed += 1
    assert composed >= 7


def test_document_links_exist():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} -> {target}"
