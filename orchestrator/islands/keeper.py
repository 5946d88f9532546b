"""Ends local islands: when it is asked to, and when whoever started them has died without a word.

`python -m orchestrator.islands.keeper FOLDER` waits until its standard input is closed, which happens however its
owner ends, and then takes down what is left in the folder.
"""

import json
import shutil
import sys
from pathlib import Path

from orchestrator.islands.marked import kill_marked

FOLDER = Path("~/.ddm/islands")
"""Where `ddm islands up` keeps tokens and storages unless told otherwise."""

STATE = "island.json"
"""In an island's folder while it has processes or temporary files: where they are."""

TOKEN = "token"  # noqa: S105 - the name of a file


def take_down(folder: Path) -> list[str]:
    """Kill every island in a folder, delete its token and its temporary files, and name it; its storage stays."""
    found = sorted(folder.glob(f"*/{STATE}"))
    for state in found:
        kill_marked(str(state.parent))
        shutil.rmtree(json.loads(state.read_text(encoding="utf-8"))["scratch"], ignore_errors=True)
        (state.parent / TOKEN).unlink(missing_ok=True)
        state.unlink(missing_ok=True)
    return [state.parent.name for state in found]


if __name__ == "__main__":
    sys.stdin.buffer.read()
    take_down(Path(sys.argv[1]))
