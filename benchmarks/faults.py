"""Faults and hostile input (`make faults`): crashes, damages, attacks, and tests that each cause a fault.

Every part can run alone. `docs/benchmarks/faults.json` has the latest result of each; the spread names its commit.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.large_runs import large_run_claims
from benchmarks.record import RESULTS, Claim, write_result
from benchmarks.testbed.crashes import crash_claims
from benchmarks.testbed.damages import damages_claims
from benchmarks.testbed.hostile_folders import hostile_folders_claims
from ddm_core.artifacts import read_json, write_json
from orchestrator.controller import project_commit

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultTests:
    """One claim and the tests that prove it."""

    name: str
    target: str
    tests: tuple[str, ...]


FAULT_TESTS = (
    FaultTests(
        name="lease: eight takers with killed holders, with and without hard links, with delayed views of the folder",
        target="0 of 10,000 rounds have two holders",
        tests=("tests/orchestrator/run/test_lease.py",),
    ),
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


def fault_test_claims() -> Iterable[Claim]:
    """Run all fault tests and yield one claim per set."""
    return map(_run_tests, FAULT_TESTS)


PARTS: dict[str, Callable[[], Iterable[Claim]]] = {
    "kills": lambda: crash_claims(kills=80, ray_kills=20, disks=0),
    "disks": lambda: crash_claims(kills=0, ray_kills=0, disks=50),
    "damages": damages_claims,
    "hostile": hostile_folders_claims,
    "large": large_run_claims,
    "tests": fault_test_claims,
}
"""The parts by name."""


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


def run_part(name: str) -> None:
    """Run one part and keep its claims in `docs/benchmarks/results`."""
    started, claims = time.monotonic(), []
    for claim in PARTS[name]():
        claims.append(replace(claim, spread=f"{claim.spread}; commit {project_commit()}".removeprefix("; ")))
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})", flush=True)
    write_json(_result_file(name), {"seconds": time.monotonic() - started, "claims": claims})


def _result_file(name: str) -> Path:
    return RESULTS / "results" / f"faults-{name}.json"


def main() -> None:
    """Run the parts and write docs/benchmarks/faults.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    for name in parser.parse_args().parts:
        run_part(name)
    results = [read_json(_result_file(name)) for name in PARTS if _result_file(name).is_file()]
    claims = [Claim(**claim) for result in results for claim in result["claims"]]
    write_result("faults", sum(result["seconds"] for result in results), claims)


if __name__ == "__main__":
    main()
