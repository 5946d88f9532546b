"""Run every command on faulty inputs and outputs, and write docs/fault_matrix.md: exit code, seconds, message.

    python benchmarks/fault_matrix.py [--run FOLDER]

FOLDER is a finished run, such as one of `experiment=digits`; without it one is made. A read-only and a full disk need
the right to mount (root); these rows are left out for others, and unreadable files for root.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.tiny_run import TINY

ON_A_RUN = ("status", "logs", "stop", "resume --trust", "sample --out {out}", "evaluate --selection full", "audit")
MORE_ON_A_RUN = ("classify", "compress --trust quantize=int8_weight_only", "experts list", "verify", "report")
ON_DATA = ("init --out {out}.yaml --force", "plan data=image_folder data.path=", "run data=image_folder data.path=")
SMALL = (
    "compute=inline wandb.mode=disabled data.image_size=8 codec.components=16 partition.num_experts=2 partition=random "
    "expert=residual_mlp_small expert.training.batch_size=80 expert.training.steps=20 router.training.steps=20 "
    "scores.num_samples=64 ensemble.steps=2 monolith=false"
)
"""A run of the images that would succeed if nothing were wrong with them."""

PAGE = Path(__file__).parents[1] / "docs" / "fault_matrix.md"
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one command ended on one fault."""

    command: str
    fault: str
    code: int
    seconds: float
    cpu_s: float
    message: str
    has_traceback: bool


def missing(path: Path) -> None:
    """Remove the input."""
    shutil.rmtree(path)


def wrong_type(path: Path) -> None:
    """Put a file in place of the folder."""
    shutil.rmtree(path)
    path.write_text("not a folder")


def truncated(path: Path) -> None:
    """Cut the configuration of a run, or every image, in half."""
    for file in [path / "config.yaml"] if (path / "config.yaml").exists() else path.rglob("*.png"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def not_text(path: Path) -> None:
    """Replace the configuration of a run, or every image, by other bytes."""
    for file in [path / "config.yaml"] if (path / "config.yaml").exists() else path.rglob("*.png"):
        file.write_bytes(b"\xff\x00\xfe" * 30)


def unreadable(path: Path) -> None:
    """Withdraw the right to read."""
    path.chmod(0)


FAULTS: dict[str, Callable[[Path], None]] = {
    "missing": missing,
    "a file in its place": wrong_type,
    "truncated": truncated,
    "other bytes": not_text,
}
MOUNTED = {
    "read-only disk": "mount --bind {path} {path} && mount -o remount,ro,bind {path}",
    "full disk": "mount -t tmpfs -o size={size}k tmpfs {mount} && cp -r {path}/. {mount} ; "
    "dd if=/dev/zero of={mount}/fill bs=4k 2>/dev/null; mount --bind {mount} {path}",
}


def main() -> None:
    """Run every combination and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="made by the present version")
    with tempfile.TemporaryDirectory(prefix="ddm-faults-") as name:
        folder = Path(name)
        run = parser.parse_args().run or make_run(folder / "run")
        rows = list(measure(folder, run, make_images(folder / "images")))
    PAGE.write_text(to_page(rows), encoding="utf-8")
    sys.exit(f"{PAGE} has tracebacks" if any(row.has_traceback for row in rows) else 0)


def make_run(folder: Path) -> Path:
    """Run the digits in a minute."""
    subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", *TINY, "monolith=false", f"folder={folder}"], check=True
    )
    return folder


def make_images(folder: Path) -> Path:
    """Write 240 images of two classes."""
    from PIL import Image

    for number in range(240):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 255 - number, 90)).save(path)
    return folder


def measure(folder: Path, run: Path, images: Path) -> Iterator[Row]:
    """Yield a row for every command and fault."""
    faults = FAULTS | ({} if os.geteuid() == 0 else {"unreadable": unreadable})
    for commands, source in (((*ON_A_RUN, *MORE_ON_A_RUN), run), (ON_DATA, images)):
        for command in commands:
            for fault, apply in faults.items():
                path = copy_input(source, folder / "input")
                apply(path)
                yield execute(command, fault, path, folder)
                if path.is_dir():
                    path.chmod(0o755)
            for fault, mount in MOUNTED.items() if os.geteuid() == 0 else ():
                path, full = copy_input(source, folder / "input"), folder / "full"
                full.mkdir(exist_ok=True)
                size = sum(file.stat().st_size // 1024 + 8 for file in path.rglob("*")) + 64
                yield execute(command, fault, path, folder, mount.format(path=path, mount=full, size=size))


def copy_input(source: Path, path: Path) -> Path:
    """Return a fresh copy of an input."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    shutil.copytree(source, path, symlinks=True)
    return path


def execute(command: str, fault: str, path: Path, folder: Path, mount: str = "") -> Row:
    """Run one command on the input, and describe its end."""
    shutil.rmtree(folder / "new", ignore_errors=True)
    verb, _, options = command.format(out=folder / "out.png").partition(" ")
    if verb in ("plan", "run"):
        words = [verb, *f"{options}{path} folder={folder / 'new'} {SMALL}".split()]
    elif verb == "experts":
        words = [verb, options, str(path)]
    else:
        words = [verb, str(path), *options.split()]
    line = [sys.executable, "-m", "orchestrator", *words]
    if mount:
        line = ["unshare", "-m", "bash", "-c", f'{mount}; exec "$@"', "bash", *line]
    before, start = os.times(), time.monotonic()
    try:
        ended = subprocess.run(
            line, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
        code, text = ended.returncode, ended.stdout + ended.stderr
    except subprocess.TimeoutExpired:
        code, text = 124, f"no end after {TIMEOUT_S:g} s"
    after = os.times()
    message = text[text.rfind("Error: ") :] if ended_badly(code, text) else (text.strip().splitlines() or [""])[-1]
    row = Row(
        command=f"ddm {command.replace('{out}', 'FILE')}",
        fault=fault,
        code=code,
        seconds=time.monotonic() - start,
        cpu_s=after.children_user + after.children_system - before.children_user - before.children_system,
        message=re.sub(r"\s+", " ", message.replace(str(folder), "…")).strip()[:230],
        has_traceback="Traceback" in text,
    )
    print(f"{row.command:40} {fault:20} {code} {row.seconds:5.1f} s {row.message[:110]}", flush=True)
    return row


def ended_badly(code: int, text: str) -> bool:
    """Return whether the last message of a command is an error."""
    return code != 0 and "Error: " in text


def to_page(rows: list[Row]) -> str:
    """Return the page as Markdown."""
    lines = [
        "# Fault matrix",
        "",
        "Every command on faulty inputs and outputs, written by `python benchmarks/fault_matrix.py`. The input is",
        "the run folder, or the folder of images for `init`, `plan` and `run`. Seconds are wall time on a busy",
        "machine; CPU-seconds depend less on its load.",
        "",
        f"{len(rows)} combinations, {sum(row.has_traceback for row in rows)} tracebacks.",
        "",
        "| command | fault | exit code | seconds | CPU s | message |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        message = row.message.replace("|", "\\|").replace("<", "&lt;")
        lines.append(
            f"| `{row.command}` | {row.fault} | {row.code} | {row.seconds:.1f} | {row.cpu_s:.1f} | {message} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
