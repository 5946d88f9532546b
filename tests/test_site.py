"""The documentation site: every page is in the navigation, and every command and code block on it works."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.cli.exits import OTHER
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import PAGE
from tests.laws.conftest import tiny_run as finished_run
from tests.test_house import ROOT, commands_in, sources

PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = sorted({line for page in PAGES for line in commands_in(page) if line.startswith("ddm ")})


def listed(entries: object) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [name for value in values for name in listed(value)]


def test_every_page_is_in_the_navigation():
    names = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent.name != "decisions"}
    assert {name for name in names if not name.endswith("/")} == pages and "decisions/" in names


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_parsed(line):
    words = shlex.split(line.partition(" && ")[0], comments=True)[1:]
    typer.main.get_command(app).make_context("ddm", words[:1])
    command = typer.main.get_command(app).commands[words[0]]
    group = getattr(command, "commands", None)
    command, arguments = (group[words[1]], words[2:]) if group else (command, words[1:])
    command.make_context("ddm", arguments)
    if words[0] in ("run", "plan") and not {"-m", "--config"} & set(words) and "…" not in line:
        parse_config(compose([word for word in arguments if "=" in word]))


EXECUTED = re.compile(r"ddm (?!.*(--follow|…))(status|logs|verify|report|experts list|pool render) ")


def test_quick_commands_run(tiny_run: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/digits")
    lines = [line.partition(" && ")[0] for line in COMMANDS if EXECUTED.match(line)]
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert len(lines) >= 8


@pytest.mark.parametrize("page", [page for page in PAGES if "```python\nimport" in page.read_text()], ids=str)
def test_python_blocks_run(page: Path, tiny_run: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/digits").symlink_to(tiny_run)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    exec(compile(code, page.name, "exec"), {})


def test_every_error_has_a_section_and_every_section_an_error():
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    errors = {"DDMError"}
    while more := {name for name in bases if bases[name] & errors} - errors:
        errors |= more
    headings = re.findall(r"^#{2,3} (.*)", (ROOT / PAGE).read_text(), flags=re.MULTILINE)
    sections = [heading for heading in headings if heading in errors]
    assert sorted(sections) == sorted(errors)
    assert {heading.lower().replace(" ", "-") for heading in headings} >= {OTHER}
    assert [name for name in headings if name.endswith("Error") and name not in errors] == []


tiny_run = finished_run
