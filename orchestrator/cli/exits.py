"""How a command ends: an exit code, and one message on standard error instead of a traceback."""

import contextlib
import os
import sys
from collections.abc import Callable

from rich.text import Text

from ddm_core.errors import DDMError
from orchestrator.errors import PAGE, BudgetReached
from orchestrator.reporting.terminal import open_console

FAILED, BUDGET, INTERRUPTED = 1, 3, 130
"""Exit codes; docs/guides/scripts.md lists all of them."""

MEMORY_SIGNS = ("can't allocate memory", "out of memory")
NO_MEMORY = "this needs more memory than there is; ask for fewer or smaller images, fewer steps, or a smaller batch"

OTHER = "everything-else"
"""The section on errors of the operating system."""


def run_command(command: Callable[[], object]) -> int:
    """Run a command and return its exit code.

    The project's errors and those of the operating system become one message; Ctrl-C is 130, as in a shell.
    """
    try:
        command()
        sys.stdout.flush()
    except SystemExit as ending:
        return _flush(ending.code if isinstance(ending.code, int) else int(ending.code is not None))
    except KeyboardInterrupt:
        return INTERRUPTED
    except DDMError as error:
        print_error(str(error), type(error).__name__)
        return _flush(BUDGET if isinstance(error, BudgetReached) else FAILED)
    except OSError as error:
        print_error(describe_os_error(error), OTHER)
        return _flush(FAILED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(f"{NO_MEMORY} ({error or type(error).__name__})", OTHER)
        return _flush(FAILED)
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the machine or a GPU ran out; torch raises a `RuntimeError` for both."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in MEMORY_SIGNS)


def describe_os_error(error: OSError) -> str:
    """Return the place, the reason and the way out of an error of the operating system."""
    place = error.filename if error.filename is not None else "a file or the output"
    return f"{place}: {error.strerror or error}; check that it exists, is yours, and that its disk has space"


def print_error(text: str, section: str = "") -> None:
    """Print an error on standard error, without control characters that could rewrite the terminal, and its section."""
    shown = "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
    help_text = f"\nSee {PAGE}#{section.lower()}" if section else ""
    with contextlib.suppress(OSError):
        open_console(stderr=True).print(
            Text.assemble(("Error:", "red"), f" {shown}", (help_text, "dim")), soft_wrap=True, highlight=False
        )


def _flush(code: int) -> int:
    """Write what is buffered; a full or closed output makes a failure of a success, and no noise at the end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code:
            print_error(f"standard output: {error.strerror}")
        return code or FAILED
    return code
