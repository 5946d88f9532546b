"""Which tests are proofs: they start Ray clusters, pools, sweeps or disks of their own, and `make proof` runs them."""

from pathlib import Path

import pytest

from orchestrator.controller import shield

shield(None)  # Ray reads its switches when it is imported, and some tests import it as they are collected

HERE = Path(__file__).parent

PROOFS = (
    "laws/test_full_disk.py",
    "orchestrator/islands",
    "orchestrator/planning",
    "orchestrator/pools",
    "orchestrator/sweeps",
    "orchestrator/test_slurm_backend.py",
    "orchestrator/test_submission.py",
    "orchestrator/test_train_group.py",
)
"""Where a slow test is a proof, unless it is one of those below."""

ALWAYS = ("test_controllers_and_experts_are_killed_and_the_run_comes_to_its_end",)
"""What `make test` does all the same: one whole run on two real Ray clusters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the proofs."""
    for item in items:
        place = str(item.path.relative_to(HERE))
        if item.get_closest_marker("slow") and place.startswith(PROOFS) and item.name not in ALWAYS:
            item.add_marker(pytest.mark.proof)
