"""The console of the commands, on which text from a run folder appears as it is: nothing in a string is markup.

Color comes from `rich.text.Text` alone. With `--json` standard output has the result alone, as one JSON value; whatever
a command or a library prints meanwhile is redirected to standard error.
"""

import contextlib
import json
import sys
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

_RESULT: ContextVar[TextIO] = ContextVar("result")
"""The standard output, while everything but the result is redirected."""


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that prints `[red]` and `:smile:` verbatim."""
    return Console(stderr=stderr, markup=False, emoji=False)


def _redirect_output(context: typer.Context, value: bool) -> bool:
    """Reserve standard output for `print_json`, until the command ends."""
    if value:
        _RESULT.set(sys.stdout)
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    return value


AsJson = Annotated[
    bool,
    typer.Option(
        "--json", callback=_redirect_output, help="Print the result as JSON; all else is printed on standard error"
    ),
]
"""The option `--json`; a command that has it calls `print_json` once, if it is set."""


def print_json(facts: object) -> None:
    """Print the result of a command with `--json` on the standard output that is reserved for it."""
    _RESULT.get().write(format_json(facts))


def format_json(facts: object) -> str:
    """Return dataclasses, mappings, lists and paths as one JSON value; numbers that are not finite are null."""
    from ddm_core.artifacts import to_jsonable

    finite: Any = json.loads(json.dumps(to_jsonable(facts)), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1) + "\n"
