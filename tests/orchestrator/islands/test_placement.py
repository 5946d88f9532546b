"""Placement: within an island's size, only where reachable, on demand after too many preemptions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.islands.placement import Load, compute_load, place
from orchestrator.run.backend import Job


def make_job(kind="expert", preemptions=0, **resources) -> Job:
    return Job(
        stage="expert_0",
        kind=kind,
        config={},
        inputs={},
        input_fingerprints={},
        artifact="",
        scratch="",
        attempt=0,
        stop_files=(),
        resources=ResourcesConfig(**resources),
        preemption_count=preemptions,
    )


def make_config(**islands) -> ComputeConfig:
    common = {"address": "http://127.0.0.1:1", "token_file": "t", "storage": "/s"}
    return ComputeConfig(
        backend="islands", islands={name: IslandConfig(**common, **facts) for name, facts in islands.items()}
    )


IDLE = Load()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 6), st.integers(1, 6))
def test_jobs_on_an_island_never_exceed_its_size(requests, west, east):
    config = make_config(west={"cpus": west}, east={"cpus": east})
    placed = {"west": [], "east": []}
    for cpus in requests:
        job = make_job(cpus=cpus)
        if cpus > max(west, east):
            with pytest.raises(ConfigError, match="no island is that large"):
                place(job, config, {name: IDLE for name in placed})
            continue
        loads = {
            name: compute_load(jobs, is_reachable=True, stored_stages=frozenset()) for name, jobs in placed.items()
        }
        island = place(job, config, loads)
        if island is None:
            assert all(loads[name].cpus + cpus > size for name, size in (("west", west), ("east", east)))
        else:
            placed[island].append(job)
    for name, size in (("west", west), ("east", east)):
        assert sum(job.resources.cpus for job in placed[name]) <= size


def test_unreachable_island_gets_no_job():
    config = make_config(west={}, east={"price_per_hour": 9.0})
    assert place(make_job(), config, {"west": Load(is_reachable=False), "east": IDLE}) == "east"
    assert place(make_job(), config, {"west": Load(is_reachable=False), "east": Load(cpus=1)}) is None


def test_rank_is_checkpoints_then_price_then_load():
    config = make_config(west={"cpus": 4, "price_per_hour": 4.0}, east={"cpus": 4, "price_per_hour": 8.0})
    assert place(make_job(), config, {"west": Load(cpus=2), "east": IDLE}) == "west"
    assert (
        place(make_job(), config, {"west": IDLE, "east": Load(cpus=2, stored_stages=frozenset({"expert_0"}))}) == "east"
    )


def test_job_after_many_preemptions_goes_on_demand_if_possible():
    config = make_config(spot={"preemptible": True}, on_demand={"price_per_hour": 9.0})
    idle = {"spot": IDLE, "on_demand": IDLE}
    assert [place(make_job(preemptions=count), config, idle) for count in range(5)] == ["spot"] * 2 + ["on_demand"] * 3
    assert place(make_job(preemptions=3), config, {"spot": IDLE, "on_demand": Load(cpus=1)}) is None
    assert place(make_job(preemptions=9), make_config(spot={"preemptible": True}), {"spot": IDLE}) == "spot"


def test_trainings_go_to_islands_and_other_stages_are_local():
    config = make_config(west={})
    assert place(make_job("expert"), config, {"west": IDLE}) == "west"
    assert place(make_job("score"), config, {"west": IDLE}) == CONTROLLER
    assert place(make_job("score", islands=("west",)), config, {"west": IDLE}) == "west"


def test_load_counts_workers_and_gpus():
    config = make_config(west={"cpus": 8, "gpus": 2})
    assert place(make_job(gpus=1, workers=2), config, {"west": IDLE}) == "west"
    assert place(make_job(gpus=1, workers=2), config, {"west": Load(gpus=1)}) is None
