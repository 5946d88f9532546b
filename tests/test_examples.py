"""The files of a project: examples that compose, and metadata that agree with the package."""

import itertools
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from orchestrator.cli.compress import with_compression
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.pipeline.graph import build_graph
from orchestrator.sweeps.trial import label_trial

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.sh"))


def read_commands(path: Path) -> list[list[str]]:
    """Return the words of every ddm command of a script, as the shell splits them."""
    lines = path.read_text().replace("\\\n", " ").replace('"$1"', "pictures").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("ddm ")]


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


def expand(overrides: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of every trial of a sweep, as Hydra expands them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [text]
        for text, override in zip(overrides, parsed, strict=True)
    ]
    yield from map(list, itertools.product(*choices))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_composes(path):
    for command, *words in read_commands(path):
        overrides = [word for word in words if "=" in word and not word.startswith(("runs/", "hydra/"))]
        if command == "run":
            for trial in expand(overrides):
                config = parse_config(compose(trial))
                assert build_graph(config) and config.folder == f"runs/{config.name}"
        elif command == "compress":
            with_compression(config, overrides)


def test_compressed_trial_is_one_of_the_sweep():
    run, compress = read_commands(ROOT / "examples" / "sweep_and_compress.sh")
    assert compress[1] == f"runs/sweep/{label_trial({'partition.num_experts': '4', 'seed': '0'})}"


def test_citation_and_changelog_have_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version and citation["authors"] == [{"name": "The ddm authors"}]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_quickstart_log_is_that_of_the_script():
    script = runpy.run_path(str(ROOT / "docs" / "generate_quickstart.py"))
    log = script["DOCUMENT"].read_text()
    experiment = re.search(r"generate_quickstart\.py (\w+)`", log)[1]
    assert re.findall(r"^\| `(ddm .*?)` \|", log, re.MULTILINE) == script["commands"](experiment)
