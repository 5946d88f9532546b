"""Which tests are proofs: they start Ray clusters, pools, sweeps or disks of their own, and `make proof` runs them."""

from importlib import import_module
from pathlib import Path

import pytest

HEAVY = (
    "beartype.door",
    "diffusers.hooks",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.models.unets.unet_2d",
    "faiss",
    "scipy.stats",
    "sklearn.linear_model",
    "torch._dynamo",
)
"""Libraries that a module of ours must not be the first to import: under jaxtyping's hook all of them compile anew."""
for library in HEAVY:
    import_module(library)

import_module("orchestrator.controller").shield(None)  # Ray reads its switches when tests that need it are collected

HERE = Path(__file__).parent

PROOFS = (
    "laws/test_full_disk.py",
    "orchestrator/islands",
    "orchestrator/planning",
    "orchestrator/pools",
    "orchestrator/sweeps",
    "orchestrator/backends/test_ray_train.py",
    "orchestrator/backends/test_slurm.py",
    "orchestrator/cli/test_submit.py",
)
"""Where a slow test is a proof, unless it is one of those below."""

SLOWEST = (
    "test_it_is_gone_with_its_process",
    "test_a_sweep_runs_every_combination_in_a_folder_of_its_own",
    "test_ctrl_c_leaves_a_run_that_can_be_continued",
    "test_an_experts_worker_that_is_killed_goes_on_from_its_checkpoint",
    "test_a_changed_router_value_runs_the_router_and_what_holds_it",
    "test_all_of_fashion_holds_out_half_of_its_test_images",
    "test_an_expert_that_fails_for_good_does_not_sink_the_run",
    "test_memory_does_not_grow_with_the_data",
    "test_a_compiled_network_trains_as_well",
    "test_sigterm_at_any_moment_costs_no_step_and_no_byte",
    "test_a_finished_expert_is_kept_and_never_mistaken_for_another",
    "test_training_the_layers_that_are_told_the_time_lowers_the_error_and_the_sensitive_ones_lower_it_more",
    "test_on_a_trained_transformer_every_part_helps",
    "test_killed_and_started_again_gives_the_same_bytes",
    "test_a_controller_killed_at_five_random_moments_loses_nothing",
    "test_what_is_faster_goes_through_the_other_stages_and_is_sampled_like_the_whole",
    "test_learned_masks_leave_better_samples_than_chance_and_magnitude[units-0.5]",
    "test_other_drafts_are_better_than_a_step_from_noise[autoregressive]",
    "test_one_step_is_nearer_to_the_data_than_one_plain_step_and_no_sample_was_looked_at",
    "test_a_whole_run_with_experts_that_differ_all_baselines_and_a_router_without_data",
    "test_the_wheel_runs_the_pipeline_from_another_folder",
    "test_one_step_is_nearer_to_the_data_than_one_plain_step[False]",
    "test_one_step_is_nearer_to_the_data_than_one_plain_step[True]",
    "test_a_short_chain_comes_nearer_to_the_data_on_noise_that_trained_nothing",
)
"""Proofs for their length alone, wherever they stand."""

ALWAYS = ("test_controllers_and_experts_are_killed_and_the_run_comes_to_its_end",)
"""What `make test` does all the same: one whole run on two real Ray clusters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the proofs, and begin with the files that take long, so that all workers end together."""
    long = set()
    for item in filter(lambda item: item.get_closest_marker("slow"), items):
        place = str(item.path.relative_to(HERE))
        is_proof = place.startswith(PROOFS) and item.name not in ALWAYS
        if is_proof or item.name in SLOWEST:
            item.add_marker(pytest.mark.proof)
        else:
            long.add(item.path)
    items.sort(key=lambda item: item.path not in long)
