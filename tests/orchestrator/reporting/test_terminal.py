"""Whatever a name, a path or an error contains is printed as it is."""

import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from orchestrator.cli.app import main
from orchestrator.config.schema import RunConfig
from orchestrator.reporting.progress import MARKS, RunDisplay
from orchestrator.reporting.status import status_table
from orchestrator.reporting.tables.score_table import score_table
from orchestrator.reporting.terminal import open_console
from orchestrator.run.run_folder import RunFolder
from tests.orchestrator.fakes import diamond
from tests.orchestrator.reporting.tables.test_ranking import score_row

PIECES = ("[/bold]", "[red]", "[/]", "[", "]", "\\[", ":smile:", "[link=file:x]", "[@click=f]", "a b", "é")
hostile = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).map(str.strip).filter(bool)


def printed(console: Console, renderable: object) -> str:
    console.file, console.width = io.StringIO(), 1000
    console.print(renderable, soft_wrap=isinstance(renderable, str | Text))
    return console.file.getvalue()


def packed(text: str) -> str:
    """Return a text without white space: tables wrap their titles."""
    return "".join(text.split())


@given(hostile)
def test_console_of_the_commands_prints_strings_verbatim(text):
    assert printed(open_console(), text) == f"{text}\n"


@given(hostile, st.sampled_from(sorted(set(MARKS) - {"kept", "left_out"})))
def test_event_prints_its_text_verbatim_on_any_console(tmp_path_factory, text, event):
    console = Console(file=io.StringIO(), width=1000)
    RunDisplay(RunFolder(tmp_path_factory.getbasetemp()), console).event(event, diamond()[1], text)
    assert text in console.file.getvalue()


@settings(max_examples=30, deadline=None)
@given(hostile)
def test_status_shows_the_folder_verbatim_on_any_console(tmp_path_factory, name):
    run = RunFolder(tmp_path_factory.mktemp("run") / name)
    run.save_config(RunConfig(folder=str(run.root)))
    assert packed(name) in packed(printed(Console(emoji=False), status_table(run)))


@given(hostile)
def test_score_table_shows_labels_verbatim(name):
    table = score_table([score_row(name, 30.0, 1.0, 0.1)])
    assert packed(name) in packed(printed(open_console(), table))


@pytest.mark.parametrize("command", ["status", "logs", "report", "sample", "stop", "resume", "verify"])
def test_error_names_the_folder_verbatim(tmp_path, monkeypatch, capsys, command):
    folder = tmp_path / "[/bold][red]x:smile:"
    monkeypatch.setattr(sys, "argv", ["ddm", command, str(folder)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1 and str(folder) in capsys.readouterr().err
