"""Placement: never more than an island has, never where nobody answers, firm ground after too many losses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.islands.placement import Load, load_of, place
from orchestrator.run.backend import Job


def job(kind="expert", losses=0, **asked) -> Job:
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
        resources=ResourcesConfig(**asked),
        preemption_count=losses,
    )


def compute(**islands) -> ComputeConfig:
    common = {"address": "http://127.0.0.1:1", "token_file": "t", "storage": "/s"}
    return ComputeConfig(
        backend="islands", islands={name: IslandConfig(**common, **facts) for name, facts in islands.items()}
    )


IDLE = Load()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 6), st.integers(1, 6))
def test_no_island_is_ever_given_more_than_it_has(asked, west, east):
    config = compute(west={"cpus": west}, east={"cpus": east})
    given_to = {"west": [], "east": []}
    for cpus in asked:
        one = job(cpus=cpus)
        if cpus > max(west, east):
            with pytest.raises(ConfigError, match="no island is that large"):
                place(one, config, {name: IDLE for name in given_to})
            continue
        loads = {name: load_of(jobs, is_reachable=True, held=frozenset()) for name, jobs in given_to.items()}
        chosen = place(one, config, loads)
        if chosen is None:
            assert all(loads[name].cpus + cpus > size for name, size in (("west", west), ("east", east)))
        else:
            given_to[chosen].append(one)
    for name, size in (("west", west), ("east", east)):
        assert sum(one.resources.cpus for one in given_to[name]) <= size


def test_an_island_that_does_not_answer_gets_nothing():
    config = compute(west={}, east={"price_per_hour": 9.0})
    assert place(job(), config, {"west": Load(is_reachable=False), "east": IDLE}) == "east"
    assert place(job(), config, {"west": Load(is_reachable=False), "east": Load(cpus=1)}) is None


def test_checkpoints_come_before_price_and_price_before_room():
    config = compute(west={"cpus": 4, "price_per_hour": 4.0}, east={"cpus": 4, "price_per_hour": 8.0})
    assert place(job(), config, {"west": Load(cpus=2), "east": IDLE}) == "west"
    assert place(job(), config, {"west": IDLE, "east": Load(cpus=2, held=frozenset({"expert_0"}))}) == "east"


def test_after_too_many_losses_only_firm_islands_are_left_if_there_are_any():
    config = compute(spot={"preemptible": True}, firm={"price_per_hour": 9.0})
    idle = {"spot": IDLE, "firm": IDLE}
    assert [place(job(losses=losses), config, idle) for losses in range(5)] == ["spot"] * 2 + ["firm"] * 3
    assert place(job(losses=3), config, {"spot": IDLE, "firm": Load(cpus=1)}) is None
    assert place(job(losses=9), compute(spot={"preemptible": True}), {"spot": IDLE}) == "spot"


def test_trainings_go_to_islands_and_the_rest_stays_at_home():
    config = compute(west={})
    assert place(job("expert"), config, {"west": IDLE}) == "west"
    assert place(job("score"), config, {"west": IDLE}) == CONTROLLER
    assert place(job("score", islands=("west",)), config, {"west": IDLE}) == "west"


def test_workers_and_gpus_count():
    config = compute(west={"cpus": 8, "gpus": 2})
    assert place(job(gpus=1, workers=2), config, {"west": IDLE}) == "west"
    assert place(job(gpus=1, workers=2), config, {"west": Load(gpus=1)}) is None
