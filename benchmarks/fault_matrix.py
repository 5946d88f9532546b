"""Run every command on faulty inputs and outputs, and write docs/fault_matrix.md: exit code, seconds, message.

A server that starts well answers one request and is stopped.

    python -m benchmarks.fault_matrix [--run FOLDER]

FOLDER is a finished run, such as one of `experiment=digits`; without it one is made. Mounts and the change of the user
need root; without it their rows are marked as not tried.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.testbed.tiny_run import TINY

SMALL = (
    "wandb.mode=disabled data.image_size=8 codec.components=16 partition.num_experts=2 partition=random "
    "expert=residual_mlp_small expert.training.batch_size=80 expert.training.steps=20 router.training.steps=20 "
    "scores.num_samples=64 ensemble.steps=2 monolith=false compute=inline"
)
"""A run of the images that would succeed if nothing were wrong with them."""

COMMANDS = {
    "RUN": (
        *("status {path}", "logs {path}", "stop {path}", "resume {path} --trust", "sample {path} --out {out}.png"),
        *("evaluate {path} --selection full", "audit {path}", "classify {path}", "experts list {path}"),
        *("experts remove {path} 0", "compress {path} --trust quantize=int8_weight_only", "verify {path}"),
        "report {path}",
        *("ui {path} --port 0", "serve {path} --inline --port 0"),
    ),
    "ARTIFACTS": ("ui {run} --port 0", "serve {run} --inline --port 0"),
    "SECRET": ("ui {run} --port 0 --token-file {path}/secret", "serve {run} --inline --port 0 --keys {path}/secret"),
    "IMAGES": (
        "init {path} --out {out}.yaml",
        f"plan data=image_folder data.path={{path}} folder={{out}} {SMALL}",
        f"run data=image_folder data.path={{path}} folder={{out}} {SMALL}",
    ),
    "FOLDER": (
        "init {images} --out {path}/new.yaml",
        "sample {run} --out {path}/new.png",
        f"run data=image_folder data.path={{images}} folder={{path}}/new {SMALL}",
    ),
}
"""By what has the fault: a run, its artifacts, the folder of a token or of keys, a folder of images, or that of the
output."""

SECRET = "secret"
"""File with a token or keys."""
SERVERS = ("ui", "serve")
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")

AS_ANOTHER_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
PAGE = Path(__file__).parents[1] / "docs" / "fault_matrix.md"
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one command ended on one fault."""

    command: str
    fault: str
    code: int | None = None
    """None: not tried."""
    is_serving: bool = False
    """Whether it is a server that has answered a request."""
    seconds: float = 0.0
    cpu_s: float = 0.0
    message: str = ""
    has_traceback: bool = False


def missing(path: Path) -> None:
    """Remove the folder, or the secret in it."""
    if (path / SECRET).exists():
        (path / SECRET).unlink()
    else:
        shutil.rmtree(path)


def wrong_type(path: Path) -> None:
    """Put a file in place of the folder, or a folder in place of the secret in it."""
    is_secret = (path / SECRET).exists()
    missing(path)
    if is_secret:
        (path / SECRET).mkdir()
    else:
        path.write_text("not a folder")


def truncated(path: Path) -> None:
    """Cut the configuration of a run, a secret, every image or every network in half."""
    for file in _contents(path):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def not_text(path: Path) -> None:
    """Replace the same files by other bytes."""
    for file in _contents(path):
        file.write_bytes(b"\xff\x00\xfe" * 30)


def unreadable(path: Path) -> None:
    """Withdraw the right to read the folder."""
    path.chmod(0)


def unreadable_file(path: Path) -> None:
    """Withdraw the right to read one of these files."""
    _contents(path)[0].chmod(0)


def nothing(path: Path) -> None:
    """Leave the folder as it is."""


def _contents(path: Path) -> list[Path]:
    if known := [path / name for name in ("config.yaml", SECRET) if (path / name).exists()]:
        return known
    return sorted(path.glob("ensemble-*/*/*.safetensors")) or sorted(path.rglob("*.png"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with a folder."""

    name: str
    apply: Callable[[Path], None] = nothing
    mount: str = ""
    """Commands of a shell in a mount namespace of its own."""
    is_foreign: bool = False
    """Whether another user calls the command."""
    is_of_contents: bool = False
    """Whether only an input can have it."""


FAULTS = (
    Fault(name="missing", apply=missing),
    Fault(name="wrong type", apply=wrong_type),
    Fault(name="truncated", apply=truncated, is_of_contents=True),
    Fault(name="other bytes", apply=not_text, is_of_contents=True),
    Fault(name="another owner", is_foreign=True),
    Fault(name="unreadable folder", apply=unreadable, is_foreign=True),
    Fault(name="unreadable file", apply=unreadable_file, is_foreign=True, is_of_contents=True),
    Fault(name="read-only disk", mount="mount --bind {path} {path} && mount -o remount,ro,bind {path}"),
    Fault(
        name="full disk",
        mount="mount -t tmpfs -o size={size}k tmpfs {mount} && cp -r {path}/. {mount} ; "
        "dd if=/dev/zero of={mount}/fill bs=4k 2>/dev/null; mount --bind {mount} {path}",
    ),
)


def main() -> None:
    """Run every combination and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="made by the present version")
    with tempfile.TemporaryDirectory(prefix="ddm-faults-") as name:
        folder = Path(name)
        for place in (folder, folder / "home"):
            place.mkdir(exist_ok=True)
            place.chmod(0o777)
        (folder / "empty").mkdir()
        run = parser.parse_args().run or make_run(folder / "run")
        sources = {"RUN": run, "IMAGES": make_images(folder / "images"), "FOLDER": folder / "empty"}
        sources |= {"ARTIFACTS": run, "SECRET": make_secret(folder / "secret")}
        rows = list(measure(folder, sources))
    PAGE.write_text(to_page(rows), encoding="utf-8")
    sys.exit(f"{PAGE} has tracebacks" if any(row.has_traceback for row in rows) else 0)


def make_run(folder: Path) -> Path:
    """Run the digits at their smallest."""
    line = [sys.executable, "-m", "orchestrator", "run", *TINY, "monolith=false", f"folder={folder}"]
    subprocess.run(line, check=True)
    return folder


def make_images(folder: Path) -> Path:
    """Write 240 images of two classes."""
    from PIL import Image

    for number in range(240):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 255 - number, 90)).save(path)
    return folder


def make_secret(folder: Path) -> Path:
    """Write a token, which is an API key too."""
    folder.mkdir()
    (folder / SECRET).write_text("0123456789abcdef" * 4)
    (folder / SECRET).chmod(0o600)
    return folder


def measure(folder: Path, sources: dict[str, Path]) -> Iterator[Row]:
    """Yield a row for every command and fault."""
    can_mount = succeeds(["unshare", "-m", "true"])
    can_change_user = succeeds([*AS_ANOTHER_USER, sys.executable, "-m", "orchestrator", "--help"])
    for role, commands in COMMANDS.items():
        for command in commands:
            for fault in FAULTS:
                shown = command.replace(SMALL, "…").format(path=role, out="OUT", run="RUN", images="IMAGES")
                of_what = "" if role in shown else f" {role}"
                row = Row(command=f"ddm {shown}", fault=fault.name + of_what)
                if role == "FOLDER" and fault.is_of_contents:
                    continue
                if can_mount >= bool(fault.mount) and can_change_user >= fault.is_foreign:
                    row = execute(row, command, fault, folder, sources, role)
                yield row
                print(
                    f"{row.command:40.40} {fault.name:20} {row.code} {row.seconds:5.1f} s {row.message[:110]}",
                    flush=True,
                )


def succeeds(line: list[str]) -> bool:
    """Return whether a command ends with exit code 0."""
    return os.geteuid() == 0 and subprocess.run(line, capture_output=True).returncode == 0


def copy_input(source: Path, path: Path) -> Path:
    """Return a fresh copy of an input."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    shutil.copytree(source, path, symlinks=True)
    return path


def execute(row: Row, command: str, fault: Fault, folder: Path, sources: dict[str, Path], role: str) -> Row:
    """Run one command on a copy with the fault, and describe its end."""
    path, mount = copy_input(sources[role], folder / "input"), folder / "full"
    run = sources["RUN"]
    if role == "ARTIFACTS":
        run, path = path, path / "artifacts"
    for name in ("out", "out.png", "out.yaml"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    mount.mkdir(exist_ok=True)
    places = {"path": path, "out": folder / "out", "run": run, "images": sources["IMAGES"]}
    arguments = command.format(**places).split()
    line = [sys.executable, "-m", "orchestrator", *arguments]
    if fault.is_foreign:
        line = [*AS_ANOTHER_USER, *line]
    if fault.mount:
        size = sum(file.stat().st_size // 1024 + 8 for file in path.rglob("*")) + 64
        script = fault.mount.format(path=path, mount=mount, size=size)
        line = ["unshare", "-m", "bash", "-c", f'{script}; exec "$@"', "bash", *line]
    fault.apply(path)
    before = os.times()
    environment = os.environ | (dict.fromkeys(("HOME", "DDM_HOME"), str(folder / "home")) if fault.is_foreign else {})
    secret = (path / SECRET).read_text(errors="replace") if (path / SECRET).is_file() else ""
    end = run_line(line, environment, folder, arguments[0] if arguments[0] in SERVERS else "", secret)
    code, output, error = end.code, end.output, end.error
    after = os.times()
    return replace(
        row,
        code=code,
        is_serving=end.is_serving,
        seconds=end.seconds,
        cpu_s=after.children_user + after.children_system - before.children_user - before.children_system,
        message=re.sub(
            r"\s+", " ", find_message(0 if end.is_serving else code, output, error).replace(str(folder), "…")
        ).strip()[:230],
        has_traceback="Traceback" in output + error,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a process ended, and what it printed."""

    code: int
    output: str
    error: str
    seconds: float
    """Until its end, or until a server's answer."""
    is_serving: bool = False


def run_line(line: list[str], environment: dict[str, str], folder: Path, server: str, secret: str) -> End:
    """Run a command to its end; stop a server with Ctrl-C after its answer to one request."""
    files, start, answer, ended_s = [folder / name for name in ("stdout", "stderr")], time.monotonic(), "", None
    with files[0].open("w") as output, files[1].open("w") as error:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=error, env=environment)
        while process.poll() is None:
            time.sleep(0.02)
            ended_s = time.monotonic() - start
            address = ADDRESS.search(files[0].read_text(errors="replace")) if server else None
            if address is not None:
                answer = request(address[0], server, secret)
                ended_s = time.monotonic() - start
                process.send_signal(signal.SIGINT)
                process.wait(TIMEOUT_S)
            elif ended_s > TIMEOUT_S:
                process.kill()
    output_text, error_text = (file.read_text(errors="replace") for file in files)
    if answer:
        output_text += f"\n{answer}"
    return End(
        code=process.returncode,
        output=output_text,
        error=error_text,
        seconds=ended_s or 0.0,
        is_serving=bool(answer),
    )


def request(address: str, server: str, secret: str) -> str:
    """Ask a page for its first run, or a service for an image; return the status."""
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}

    def send(path: str, body: bytes | None = None) -> tuple[int, str]:
        asked = urllib.request.Request(address + path, body, headers)  # noqa: S310
        try:
            with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:  # noqa: S310
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    if server == "serve":
        status, text = send("/v1/images/generations", b'{"class_label": 3, "seeds": [7]}')
        return f"POST /v1/images/generations: {status}{'' if status == 200 else ' ' + text}"
    status, text = send("/")
    if found := re.search(r'"(/run/[\w-]+)', text):
        status, _ = send(found[1])
    return f"GET {'/run/…' if found else '/'}: {status}"


def find_message(code: int, output: str, error: str) -> str:
    """Return the error of a command, or its last line; the parser of the command line puts its errors into a box."""
    if code != 0 and "Error: " in error:
        return error[error.rfind("Error: ") :]
    text = error if code else output
    lines = [line.strip("│ ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰└"]
    return " ".join(lines[-2:] if code == 2 else lines[-1:])


def to_page(rows: list[Row]) -> str:
    """Return the page as Markdown."""
    lines = [
        "# Fault matrix",
        "",
        "Every command on faulty inputs and outputs, written by `python -m benchmarks.fault_matrix`. RUN, IMAGES or",
        "FOLDER has the fault, or ARTIFACTS, the networks in RUN. Seconds are wall time on a busy machine; CPU-seconds",
        "depend less on its load. A server that starts well *serves*: it answers one request, and is stopped.",
        "",
        f"{len(rows)} combinations, {sum(row.has_traceback for row in rows)} tracebacks.",
        "",
        "| command | fault | exit code | seconds | CPU s | message |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        message = row.message.replace("|", "\\|").replace("<", "&lt;")
        code = "serves" if row.is_serving else row.code
        result = f"{code} | {row.seconds:.1f} | {row.cpu_s:.1f} | {message}"
        lines.append(f"| `{row.command}` | {row.fault} | {'– | – | – | not tried' if row.code is None else result} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
