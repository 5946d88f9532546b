"""What passes before and between the stages of a small run (`make bench-first-minutes`): every claim.

1. Imports: a new process imports what the stages of a run need. CPU seconds and modules, by kind of stage, and for a
   worker that runs every kind of the digits.
2. The first line: CPU seconds of `ddm run` until it prints something.
3. The idle share: the part of `ddm run experiment=digits` on an embedded Ray cluster in which no stage is at work.
   It holds the start of Ray, the imports of the workers, and the report.

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
from pathlib import Path

from benchmarks.record import Claim, Listing, median_and_range, write_result
from ddm_core.artifacts import to_json

GROUPS = ("partition", "expert", "score", "prune")
"""One kind of each module of stages."""

KINDS = ("dataset", "codec", "features", "partition", "reference", "router", "expert", "ensemble", "score")
"""The kinds of stages of the digits, in the order in which they run."""

IMPORT = """
import os, sys
before = os.times()
import orchestrator.run.worker
from orchestrator.config.stage_kinds import STAGE_KINDS
for kind in {kinds!r}:
    STAGE_KINDS[kind].run
if {late!r}:
    import sklearn.linear_model, torch._dynamo
after = os.times()
print(after.user + after.system - before.user - before.system, len(sys.modules))
"""
"""`late` adds what functions import: scikit-learn for the class probe, `torch._dynamo` for optimizers."""


def main() -> None:
    """Measure, write docs/benchmarks/first_minutes.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="of every measurement")
    repetitions = range(parser.parse_args().repetitions)
    started = time.monotonic()
    rows = [(kind, [measure_imports([kind]) for _ in repetitions]) for kind in GROUPS]
    worker = [measure_imports(KINDS, late=True) for _ in repetitions]
    first_lines, idle_shares = zip(*(measure_run() for _ in repetitions), strict=True)
    claims = [
        make_claim("CPU seconds of imports of a worker that trains", 4.0, [cpu for cpu, _ in dict(rows)["expert"]]),
        make_claim("… of a worker that runs every stage of the digits", 4.0, [cpu for cpu, _ in worker]),
        make_claim("CPU seconds until `ddm run` prints its first line", 1.0, first_lines),
        make_claim("share of a digits run on Ray in which no stage is at work", 0.25, idle_shares),
    ]
    table = [
        (kind, *median_and_range([cpu for cpu, _ in measured], 2), f"{measured[0][1]:,}")
        for kind, measured in [*rows, ("all of the digits", worker)]
    ]
    listing = Listing(title="Imports by kind of stage", columns=("kind", "CPU s", "spread", "modules"), rows=table)
    notes = [
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. The idle share is a "
        "ratio of wall-clock times, and a busy machine delays the start of Ray more than the stages."
    ]
    print(to_json(write_result("first_minutes", time.monotonic() - started, claims, [listing], notes)))


def make_claim(name: str, bar: float, values: Sequence[float]) -> Claim:
    """Return the claim that the median of the values is at most `bar`."""
    value, spread = median_and_range(values, 2)
    return Claim(name=name, bar=f"≤ {bar:g}", value=value, spread=spread, holds=float(value) <= bar)


def measure_imports(kinds: Iterable[str], *, late: bool = False) -> tuple[float, int]:
    """Return CPU seconds and modules of a new process that imports what stages of these kinds need."""
    code = IMPORT.format(kinds=tuple(kinds), late=late)
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), int(words[1])


def measure_run() -> tuple[float, float]:
    """Run the digits; return CPU seconds until the first line, and the share of the time with no stage at work."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits"
        words = ["experiment=digits", f"folder={run}", "wandb.mode=disabled"]
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
        return first_line, 1 - busy_seconds(map(json.loads, journal)) / (time.time() - started)


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
