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

SLOWEST = (
    "test_it_is_gone_with_its_process",
    "test_ctrl_c_leaves_a_run_that_can_be_continued",
    "test_an_experts_worker_that_is_killed_goes_on_from_its_checkpoint",
    "test_memory_does_not_grow_with_the_data",
    "test_a_compiled_network_trains_as_well",
    "test_sigterm_at_any_moment_costs_no_step_and_no_byte",
    "test_a_finished_expert_is_kept_and_never_mistaken_for_another",
    "test_training_the_layers_that_are_told_the_time_lowers_the_error_and_the_sensitive_ones_lower_it_more",
    "test_on_a_trained_transformer_every_part_helps",
)
"""Proofs for their length alone, wherever they stand: four minutes together."""

ALWAYS = ("test_controllers_and_experts_are_killed_and_the_run_comes_to_its_end",)
"""What `make test` does all the same: one whole run on two real Ray clusters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the proofs."""
    for item in items:
        place = str(item.path.relative_to(HERE))
        is_proof = place.startswith(PROOFS) and item.name not in ALWAYS
        if item.get_closest_marker("slow") and (is_proof or item.name in SLOWEST):
            item.add_marker(pytest.mark.proof)
