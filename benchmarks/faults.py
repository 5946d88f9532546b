"""Faults and hostile input as claims: each is a set of tests that cause the fault; they run here and are counted."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Claim

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultTests:
    """One claim and the tests that prove it."""

    name: str
    target: str
    tests: tuple[str, ...]


FAULT_TESTS = (
    FaultTests(
        name="disk full, damaged shard, checkpoint, manifest; wrong or expired token, wrong Ray version, clock skew, "
        "read-only storage",
        target="a named error within seconds, no loss; bit flips 100 % detected",
        tests=(
            "tests/laws/test_corruption.py",
            "tests/orchestrator/islands/storage/test_storage_faults.py",
            "tests/orchestrator/islands/preflight/test_check.py",
        ),
    ),
    FaultTests(
        name="hostile tar, pickle for weights, foreign _target_, zip bomb, control characters",
        target="refused with a named error",
        tests=("tests/laws/test_hostile_input.py",),
    ),
    FaultTests(
        name="unauthenticated call to every port that the project opens",
        target="refused",
        tests=("tests/orchestrator/islands/test_security.py",),
    ),
)


def faults_claims() -> list[Claim]:
    """Run all fault tests and return one claim per set."""
    return [_run_tests(fault_tests) for fault_tests in FAULT_TESTS]


def _run_tests(fault_tests: FaultTests) -> Claim:
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--durations=1", "-p", "no:cacheprovider", *fault_tests.tests]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", process.stdout.splitlines()[-1])
    slowest = re.search(r"([\d.]+)s call", process.stdout)
    return Claim(
        name=fault_tests.name,
        bar=fault_tests.target,
        value=", ".join(f"{number} tests {outcome}" for number, outcome in counts),
        spread=f"{time.monotonic() - started:.0f} s; slowest {slowest.group(1) if slowest else '–'} s",
        holds=process.returncode == 0,
    )
