"""Faults and hostile input as claims: each is a set of tests that do it, run here and counted."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Claim

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table, and the tests that make it true."""

    name: str
    bar: str
    tests: tuple[str, ...]


ROWS = (
    Row(
        name="disk full, damaged shard, checkpoint, manifest; wrong or expired token, wrong Ray version, clock skew, "
        "read-only storage",
        bar="a named error within seconds, nothing lost; bit flips 100 % detected",
        tests=(
            "tests/laws/test_corruption.py",
            "tests/orchestrator/islands/storage/test_storage_faults.py",
            "tests/orchestrator/islands/preflight/test_check.py",
        ),
    ),
    Row(
        name="hostile tar, pickle for weights, foreign _target_, zip bomb, control characters",
        bar="refused, named",
        tests=("tests/laws/test_hostile_input.py",),
    ),
    Row(
        name="unauthenticated call to every port that we open",
        bar="refused",
        tests=("tests/orchestrator/islands/test_security.py",),
    ),
)


def faults_claims() -> list[Claim]:
    """Run the tests of every row."""
    return [_claim(row) for row in ROWS]


def _claim(row: Row) -> Claim:
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--durations=1", "-p", "no:cacheprovider", *row.tests]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", ran.stdout.splitlines()[-1])
    slowest = re.search(r"([\d.]+)s call", ran.stdout)
    return Claim(
        name=row.name,
        bar=row.bar,
        value=", ".join(f"{number} tests {word}" for number, word in counts),
        spread=f"{time.monotonic() - started:.0f} s; slowest {slowest.group(1) if slowest else '–'} s",
        holds=ran.returncode == 0,
    )
