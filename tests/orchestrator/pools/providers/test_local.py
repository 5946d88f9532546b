"""Real scaling on this machine: nodes start when jobs wait, end when idle, and leave nothing."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.config.compute import ResourcesConfig
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.islands.local.ray_head import ADDRESS, find_free_blocks
from orchestrator.islands.wheel import build_wheel
from orchestrator.pools import lifecycle
from orchestrator.pools.config import PoolConfig
from orchestrator.pools.island_config import build_islands
from orchestrator.pools.shell import PoolError
from orchestrator.run.marked_processes import find_marked_processes
from tests.orchestrator.pools.pools import load_shipped

pytestmark = pytest.mark.integration

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Pool:
    """A pool that is up, and a client of its Jobs API."""

    config: PoolConfig
    folder: Path
    client: JobSubmissionClient

    def count_nodes(self) -> int:
        """Return the number of nodes besides the head, as processes of this machine."""
        return len([pid for pid in find_marked_processes(str(self.folder)) if is_raylet(pid)]) - 1

    def submit(self, island: str, command: str) -> str:
        """Submit a job with the resources of the island's jobs."""
        resources = build_islands(self.config)[island].resources
        submission_id: str = self.client.submit_job(
            entrypoint=command, entrypoint_num_cpus=1, entrypoint_resources=resources
        )
        return submission_id

    def status(self, job: str) -> JobStatus:
        return self.client.get_job_status(job)

    def has_succeeded(self, *jobs: str) -> bool:
        return all(self.status(job) == JobStatus.SUCCEEDED for job in jobs)

    def limit_nodes(self, **max_nodes: int) -> None:
        """Change the maximum numbers of nodes, like a cloud without capacity; the autoscaler reads the file again."""
        nodes = {
            name: replace(node, max_nodes=max_nodes.get(name, node.max_nodes))
            for name, node in self.config.nodes.items()
        }
        lifecycle.write_files(replace(self.config, nodes=nodes), self.folder)


def is_raylet(pid: int) -> bool:
    try:
        return b"/raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], event: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{event} has not happened within {TIMEOUT_S} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("pool")
    overrides = (f"token_file={folder}/token", f"first_port={find_free_blocks(1, None)[0]}", "idle_minutes=0.05")
    config = load_shipped("local", *overrides)
    lifecycle.check(config, folder)
    lifecycle.up(config, folder)
    try:
        headers = {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
        yield Pool(config, folder, JobSubmissionClient(config.address, headers=headers))
    finally:
        if (folder / lifecycle.CONFIG).exists():
            lifecycle.down(config, folder)


def test_pool_starts_without_nodes_and_requires_the_token(pool):
    assert pool.count_nodes() == 0
    assert requests.get(f"{pool.config.address}/api/jobs/", timeout=10).status_code == 401
    assert {IslandClient(name, island).check_reachable() for name, island in build_islands(pool.config).items()} == {
        ray.__version__
    }
    with pytest.raises(PoolError, match="is up already"):
        lifecycle.check(pool.config, pool.folder)


def test_spot_job_waits_until_spot_nodes_are_available(pool):
    pool.limit_nodes(spot=0)
    spot = pool.submit("local_spot", "true")
    on_demand = pool.submit("local_on_demand", "true")
    wait_until(lambda: pool.has_succeeded(on_demand), "a node on demand")
    assert pool.status(spot) == JobStatus.PENDING
    pool.limit_nodes()
    wait_until(lambda: pool.has_succeeded(spot), "a spot node")


def test_nodes_start_for_waiting_jobs_and_end_when_idle(pool, tmp_path):
    """Let two jobs wait for each other, so each needs a node, and both nodes install the wheel at the same time."""
    wheel = build_wheel(tmp_path)
    spot, on_demand = (
        IslandClient(name, build_islands(pool.config)[name]) for name in ("local_spot", "local_on_demand")
    )

    def submit(name: str, other: str) -> None:
        meet = f"touch {tmp_path}/{name}; while [ ! -e {tmp_path}/{other} ]; do sleep 0.1; done"
        command = ["sh", "-c", f"python -c 'import ddm_core.artifacts' && {meet}"]
        assert spot.submit(name, command, wheel=wheel, resources=ResourcesConfig(), env={}, grace_s=1)

    submit("first", "second")
    submit("second", "first")
    wait_until(lambda: have_ended(spot, "first", "second"), "two nodes at once")
    assert {name: spot.list_states()[name].status for name in ("first", "second")} == dict.fromkeys(
        ("first", "second"), "SUCCEEDED"
    )
    assert not {"first", "second"} & on_demand.list_states().keys()
    wait_until(lambda: pool.count_nodes() == 0, "the end of idle nodes")


def have_ended(island: IslandClient, *jobs: str) -> bool:
    states = island.list_states()
    return all(states[job].has_ended for job in jobs)


def test_down_ends_jobs_that_ignore_sigterm(pool):
    stubborn = pool.submit("local_on_demand", "trap '' TERM; setsid sleep 300 & wait; sleep 300")
    wait_until(lambda: pool.status(stubborn) == JobStatus.RUNNING, "a running job")
    assert len(find_marked_processes(str(pool.folder))) > 10
    lifecycle.down(pool.config, pool.folder)
    assert find_marked_processes(str(pool.folder)) == []
    assert find_free_blocks(1, pool.config.first_port) == [pool.config.first_port]
    with pytest.raises(PoolError, match="no pool was started"):
        lifecycle.load_started_pool(pool.folder)


def test_check_with_port_in_use_raises(tmp_path):
    (first_port,) = find_free_blocks(1, None)
    config = load_shipped("local", f"token_file={tmp_path}/token", f"first_port={first_port}")
    with socket.socket() as listener:
        listener.bind((ADDRESS, first_port + 50))
        with pytest.raises(IslandError, match=f"need 100 free ports each, from {first_port} to {first_port + 99}"):
            lifecycle.check(config, tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
