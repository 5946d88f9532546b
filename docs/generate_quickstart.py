"""Write docs/quickstart_log.md: the first commands of a new user in an empty folder, their last lines and times.

Usage: python docs/generate_quickstart.py [EXPERIMENT], `digits` by default; `demo` takes minutes.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCUMENT = Path(__file__).parent / "quickstart_log.md"


def commands(experiment: str) -> list[str]:
    """Return the commands, in the order in which a new user calls them."""
    run = f"runs/{experiment}"
    return [
        f"ddm run experiment={experiment}",
        f"ddm run experiment={experiment}",
        f"ddm sample {run} --seeds 0-15 --selection sticky --out grid.png",
        f"ddm verify {run}",
        f"ddm audit {run}",
        f"ddm compress {run} quantize=int8_weight_only",
        f"ddm report {run}",
    ]


def write_log(experiment: str, document: Path) -> None:
    """Call every command, and write the document; raises `CalledProcessError` for a command that fails."""
    load = os.getloadavg()[0]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(experiment):
            started = time.monotonic()
            output = run_command(command, folder)
            seconds = time.monotonic() - started
            lines.append(f"| `{command}` | `{output.strip().splitlines()[-1].strip()}` | {seconds:.0f} s |")
    text = (
        "# The quick start, as a new user\n\n"
        f"Written by `python docs/generate_quickstart.py {experiment}`: each command in an empty folder, the last\n"
        f"line that it prints, and its time on {os.cpu_count()} cores without a GPU, at a load of {load:.1f}.\n\n"
        "| command | last line | time |\n| --- | --- | ---: |\n"
    )
    document.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def run_command(command: str, folder: str) -> str:
    """Return what a command prints, without the folder's name."""
    program = [str(Path(sys.executable).with_name("ddm")), *command.split()[1:]]
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return process.stdout.replace(f"{folder}/", "")


if __name__ == "__main__":
    write_log(*sys.argv[1:2] or ["digits"], DOCUMENT)
