"""Run every command on folders of a hostile stranger, and watch its system calls with strace.

A command may change files only in the folder, where it was told to write, and in this user's `~/.ddm`; it may signal no
process but its own, connect to nothing, and must end within seconds, without a traceback.

    python -m benchmarks.testbed.hostile_folders --folders 1000
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.record import Claim
from benchmarks.testbed.damages import make_runs
from benchmarks.testbed.forked_commands import import_what_commands_import, run_command
from benchmarks.testbed.hostile_generator import Surroundings, make_hostile
from benchmarks.testbed.tiny_run import TINY

COMMANDS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("status", "RUN"), 10),
    (("logs", "RUN"), 2),
    (("logs", "RUN", "expert_1"), 4),
    (("verify", "RUN"), 8),
    (("sample", "RUN", "--seeds", "0-1", "--out", "OUT/grid.png"), 8),
    (("experts", "list", "RUN"), 5),
    (("experts", "remove", "RUN", "0", "--out", "OUT/fewer"), 4),
    (("plan", *TINY, "folder=RUN"), 3),
    (("stop", "RUN"), 4),
    (("resume", "RUN"), 4),
    (("resume", "RUN", "--trust"), 8),
    (("run", *TINY, "folder=RUN"), 3),
    (("classify", "RUN", "--images", "4", "--draws", "1"), 4),
    (("report", "RUN"), 4),
    (("audit", "RUN"), 3),
    (("compress", "RUN", "quantize=int8_weight_only"), 2),
)
PIPELINE_COMMANDS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("sample", "RUN", "--ensemble", "PIPE", "--seeds", "0-1", "--out", "OUT/grid.png"), 3),
    (("experts", "list", "RUN", "--ensemble", "PIPE"), 2),
    (("experts", "remove", "RUN", "0", "--ensemble", "PIPE", "--out", "OUT/fewer"), 1),
    (("verify", "PIPE"), 1),
)

SYSTEM_CALLS = (
    "open,openat,openat2,creat,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,"
    "rmdir,truncate,chmod,fchmodat,chown,lchown,fchownat,utimensat,mknod,mknodat,connect,kill,tkill,tgkill,execve,"
    "pidfd_send_signal"
)
MARK = "/hostile-case/"
MEMORY_BYTES = 12 * 2**30
LIMIT_S = 20.0
HARMLESS_PROGRAMS = re.compile(r'execve\("[^"]*/(git|uname|lscpu)"')

Report = tuple[int, str, list[str], list[str]]
"""Number of the case, command, ways, what was wrong."""


def hostile_folders_claims(folders: int = 1000, seed: int = 0) -> list[Claim]:
    """Try this number of folders and return the claim about them."""
    name = "a folder from a stranger (links, pipes, devices, forged records, foreign values), any command, under strace"
    bar = "0 changes outside, 0 processes touched, 0 connections, 0 tracebacks, 0 hangs"
    if shutil.which("strace") is None:
        return [Claim(name=name, bar=bar, value="strace is not installed", spread="n = 0", holds=False)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        reports = list(try_folders(Path(scratch), folders, seed))
    wrong = Counter(fault.split(":")[0] for report in reports for fault in report[3])
    return [
        Claim(
            name=name,
            bar=bar,
            value=", ".join(f"{number} {fault}" for fault, number in wrong.items()) or "none of these",
            spread=f"n = {len(reports)} folders, {time.monotonic() - started:.0f} s",
            holds=not wrong and len(reports) >= folders,
        )
    ]


def try_folders(scratch: Path, folders: int, seed: int) -> Iterator[Report]:
    """Yield a report per folder: run all cases below strace, then read its record."""
    make_canary(scratch)
    before = fingerprint_of(scratch / "canary")
    canary = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    trace, work = scratch / "trace", [sys.executable, "-m", "benchmarks.testbed.hostile_folders", "--scratch"]
    command = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-y",
        "-qq",
        "-s",
        "300",
        "-o",
        str(trace),
        "-e",
        f"trace={SYSTEM_CALLS}",
    ]
    work += [str(scratch), "--folders", str(folders), "--seed", str(seed), "--process", str(canary.pid)]
    try:
        subprocess.run([*command, *work], check=True, env=os.environ | make_environment(scratch))
        touched = canary.poll() is not None
    finally:
        canary.kill()
        canary.wait()
    found = read_trace(trace, scratch)
    for line in (scratch / "reports").read_text().splitlines():
        number, name, ways, faults = json.loads(line)
        yield number, name, ways, faults + found.get(number, [])
    if touched or fingerprint_of(scratch / "canary") != before:
        yield -1, "all", [], ["outside: the canary process or its folder has changed"]


def make_environment(scratch: Path) -> dict[str, str]:
    """Return the variables that keep a user's own files and the caches of libraries in the scratch folder."""
    places = {"HOME": "canary", "TMPDIR": "temporary", "XDG_CACHE_HOME": "cache", "HF_HOME": "cache"}
    places |= {
        "MPLCONFIGDIR": "cache",
        "DDM_HOME": "home",
        "XDG_CONFIG_HOME": "cache",
        "TORCHINDUCTOR_CACHE_DIR": "cache",
    }
    for place in places.values():
        (scratch / place).mkdir(exist_ok=True)
    folders = {name: str(scratch / place) for name, place in places.items()}
    return folders | {"COLUMNS": "1000", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def make_canary(scratch: Path) -> None:
    """Make the folder that no command may change; it is also the user's home."""
    (scratch / "canary" / "folder" / ".cache").mkdir(parents=True)
    for name in ("file", "folder/file", "folder/.cache/file", ".bashrc", ".netrc"):
        (scratch / "canary" / name).write_text("alias ll=ls\nunfinished line")


def fingerprint_of(folder: Path) -> dict[str, tuple[float, bytes]]:
    """Return time and content of everything in a folder."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def run_cases(scratch: Path, folders: int, seed: int, process: int) -> None:
    """Run all cases in this process, which strace follows, and write the file with the reports."""
    valid, place, output = scratch / "valid", scratch / "place", scratch / "temporary" / "output"
    os.environ["DDM_HOME"] = str(scratch / "their home")
    make_runs({"finished": valid})
    os.environ["DDM_HOME"] = str(scratch / "home")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipeline = next(valid.glob("artifacts/ensemble-*"))
    for command, _ in COMMANDS:
        _copy(valid, pipeline, place)
        import_what_commands_import([_arguments(command, place)], output)
    around = Surroundings(canary=scratch / "canary", process=process)
    with (scratch / "reports").open("w") as reports:
        for number in range(folders):
            draws = random.Random(f"{seed} {number}")
            _copy(valid, pipeline, place)
            is_pipeline = draws.random() < 0.25
            ways = make_hostile(place / ("pipe" if is_pipeline else "run"), around, draws, pipeline=is_pipeline)
            choices = PIPELINE_COMMANDS if is_pipeline else COMMANDS
            command = draws.choices([name for name, _ in choices], [weight for _, weight in choices])[0]
            if "--trust" in command and any(way.startswith(("setting compute", "setting wandb")) for way in ways):
                command = ("resume", "RUN")  # what a user has trusted is used
            _mark(number)
            started = time.monotonic()
            result = run_command(_arguments(command, place), output, timeout_s=LIMIT_S)
            _mark(-1)
            faults = [f"crash: code {result.code}: {result.output[-3000:]}"] if result.is_crash else []
            if time.monotonic() - started > LIMIT_S:
                faults = ["hang: " + result.output[-500:]]
            if "\x1b" in result.output:
                faults.append("control: characters of a stranger reach the terminal")
            reports.write(json.dumps((number, " ".join(command[:3]), ways, faults)) + "\n")
            reports.flush()


def _copy(valid: Path, pipeline: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(valid, place / "run", symlinks=True)
    shutil.copytree(pipeline, place / "pipe")


def _arguments(command: Sequence[str], place: Path) -> list[str]:
    words = {"RUN": str(place / "run"), "OUT": str(place / "out"), "PIPE": str(place / "pipe")}
    return [re.sub(r"\b(RUN|OUT|PIPE)\b", lambda found: words[found[0]], word) for word in command]


def _mark(number: int) -> None:
    """Make a system call that marks the start of a case, or its end, in strace's record."""
    with contextlib.suppress(FileNotFoundError):
        os.open(f"{MARK}{number}", os.O_RDONLY)


def read_trace(trace: Path, scratch: Path) -> dict[int, list[str]]:
    """Return the forbidden system calls of each case."""
    allowed = tuple(str(scratch / name) for name in ("place", "home", "cache", "temporary"))
    found: dict[int, list[str]] = {}
    case, harness = -1, ""
    with trace.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            process, _, call = line.partition(" ")
            if MARK in call:
                case, harness = int(call.partition(MARK)[2].partition('"')[0]), process
            elif case >= 0 and process != harness and (fault := judge_call(call.strip(), process, allowed)):
                found.setdefault(case, []).append(f"{fault}: {call.strip()[:300]}")
    return found


def judge_call(call: str, process: str, allowed: Sequence[str]) -> str:
    """Return what a system call does that it must not do; empty if nothing."""
    name, _, rest = call.partition("(")
    if "resumed>" in call or name.startswith(("+++", "---")):
        return ""
    if name == "connect":
        return "" if "AF_UNIX" in rest else "connection"
    if name in ("kill", "tkill", "tgkill", "pidfd_send_signal"):
        return "" if rest.startswith(process) or re.search(r", 0\) ", rest) else "process"
    if name == "execve":
        return "" if HARMLESS_PROGRAMS.match(call) or " = -1 " in rest else "program"
    if " = -1 " in rest or (name.startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", rest)):
        return ""
    real = re.search(r"= \d+<(.*)>$", rest)
    paths = [real[1]] if real else re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', rest)
    names = [path if isinstance(path, str) else os.path.join(*path) for path in paths]
    harmless = ("/dev/null", "/dev/tty", "/proc/self", "/dev/shm")
    return "" if all(path.startswith((*allowed, *harmless)) for path in names) else "outside"


def main() -> None:
    """Try folders and print every fault; below strace, run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scratch:
        run_cases(options.scratch, options.folders, options.seed, options.process)
        return
    started, counts = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for number, command, ways, faults in try_folders(Path(scratch), options.folders, options.seed):
            counts.update(fault.split(":")[0] for fault in faults or ["good"])
            for fault in faults:
                print(f"--- {number} {command}: {'; '.join(ways)}\n{fault}", flush=True)
    print(dict(counts), f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
