"""What passes before and between the stages of a small run (`make bench-first-minutes`): every claim.

1. Imports: a new process imports what the stages of a run need. CPU seconds and modules, by kind of stage, and for a
   worker that runs every kind of the digits.
2. The first line: CPU seconds of `ddm run` until it prints something.
3. The idle share: the part of `ddm run experiment=digits` in which no stage is at work. It holds the imports of the
   process that runs the stages, and the report; on an embedded Ray cluster also the start of Ray and of its workers.

CPU seconds are those of the process itself. Other work on the machine changes them less than wall clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Claim, Listing, median_and_range, write_result
from ddm_core.artifacts import to_json

GROUPS = ("partition", "expert", "score", "prune")
"""One kind of each module of stages."""

KINDS = ("dataset", "codec", "latents", "features", "partition", "reference", "router", "expert", "ensemble", "score")
"""The kinds of stages of the digits, in the order in which they run."""

IMPORT = """
import os, sys
before = os.times()
import orchestrator.run.worker
from orchestrator.config.stage_kinds import STAGE_KINDS
for kind in {kinds!r}:
    STAGE_KINDS[kind].run
if {late!r}:
    import scipy.optimize, torch._dynamo
after = os.times()
print(after.user + after.system - before.user - before.system, len(sys.modules))
"""
"""`late` adds what functions import: `scipy.optimize` for the class probe, `torch._dynamo` for optimizers."""

BACKENDS = ("inline", "ray_local")
"""Where the digits run: in the process of the command, which is their default, and on workers of Ray."""


def main() -> None:
    """Measure, write docs/benchmarks/first_minutes.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="of every measurement")
    repetitions = range(parser.parse_args().repetitions)
    started = time.monotonic()
    rows = [(kind, [measure_imports([kind]) for _ in repetitions]) for kind in GROUPS]
    worker = [measure_imports(KINDS, late=True) for _ in repetitions]
    runs = {backend: [measure_run(backend) for _ in repetitions] for backend in BACKENDS}
    claims = [
        make_claim("CPU seconds of imports of a worker that trains", 4.0, [cpu for cpu, _ in dict(rows)["expert"]]),
        make_claim("… of a worker that runs every stage of the digits", 4.0, [cpu for cpu, _ in worker]),
        make_claim(
            "CPU seconds until `ddm run` prints its first line", 1.0, [run.first_line_cpu_s for run in runs["inline"]]
        ),
        make_claim(
            "share of a digits run in which no stage is at work", 0.25, [run.idle_share for run in runs["inline"]]
        ),
    ]
    table = [
        (kind, *median_and_range([cpu for cpu, _ in measured], 2), f"{measured[0][1]:,}")
        for kind, measured in [*rows, ("all of the digits", worker)]
    ]
    listing = Listing(title="Imports by kind of stage", columns=("kind", "CPU s", "spread", "modules"), rows=table)
    run_table = [
        (
            backend,
            *median_and_range([run.seconds for run in measured], 1),
            *median_and_range([run.idle_share for run in measured], 2),
        )
        for backend, measured in runs.items()
    ]
    run_columns = ("compute", "seconds", "spread", "idle share", "spread")
    run_listing = Listing(title="Runs of the digits", columns=run_columns, rows=run_table)
    notes = [
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. The idle share is a "
        "ratio of wall-clock times, and a busy machine delays the start of Ray more than the stages."
    ]
    print(to_json(write_result("first_minutes", time.monotonic() - started, claims, [listing, run_listing], notes)))


def make_claim(name: str, bar: float, values: Sequence[float]) -> Claim:
    """Return the claim that the median of the values is at most `bar`."""
    value, spread = median_and_range(values, 2)
    return Claim(name=name, bar=f"≤ {bar:g}", value=value, spread=spread, holds=float(value) <= bar)


def measure_imports(kinds: Iterable[str], *, late: bool = False) -> tuple[float, int]:
    """Return CPU seconds and modules of a new process that imports what stages of these kinds need."""
    code = IMPORT.format(kinds=tuple(kinds), late=late)
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), int(words[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """The times of a run of the digits."""

    seconds: float
    first_line_cpu_s: float
    """CPU seconds of the command until it prints its first line."""
    idle_share: float
    """Share of the seconds with no stage at work."""


def measure_run(backend: str) -> MeasuredRun:
    """Run the digits with a file of the group `compute`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits"
        words = ["experiment=digits", f"compute={backend}", f"folder={run}", "wandb.mode=disabled"]
        started = time.time()
        command = [sys.executable, "-P", "-m", "orchestrator", "run", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = iter(process.stdout or ())
            next(lines)
            first_line = cpu_seconds(process.pid)
            for _ in lines:
                pass
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
        journal = (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = time.time() - started
        idle_share = 1 - busy_seconds(map(json.loads, journal)) / seconds
        return MeasuredRun(seconds=seconds, first_line_cpu_s=first_line, idle_share=idle_share)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a running process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds(events: Iterable[dict[str, float | str]]) -> float:
    """Return the time in which at least one stage was at work."""
    spans = sorted((float(event["started"]), float(event["time"])) for event in events if event["event"] == "finished")
    total = end = 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


if __name__ == "__main__":
    main()
