"""The console of the commands, on which text from a run folder appears as it is: nothing in a string is markup.

Color comes from `rich.text.Text` alone.
"""

from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that prints `[red]` and `:smile:` verbatim."""
    return Console(stderr=stderr, markup=False, emoji=False)
