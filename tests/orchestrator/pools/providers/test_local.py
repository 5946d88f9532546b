"""Real scaling on this machine: nodes come when work waits and go when it does not, and nothing stays behind."""

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
from orchestrator.islands.local.processes import marked_processes
from orchestrator.islands.local.ray_head import ADDRESS, free_blocks
from orchestrator.islands.wheel import build_wheel
from orchestrator.pools import lifecycle
from orchestrator.pools.config import PoolConfig
from orchestrator.pools.island_config import islands
from orchestrator.pools.shell import PoolError
from tests.orchestrator.pools.pools import shipped

pytestmark = pytest.mark.slow

SOON_S = 60.0


@dataclass(frozen=True)
class Pool:
    """A pool that is up, and a client of its Jobs API."""

    config: PoolConfig
    folder: Path
    client: JobSubmissionClient

    def nodes(self) -> int:
        """How many nodes there are beside the head, as processes of this machine."""
        return len([pid for pid in marked_processes(str(self.folder)) if is_raylet(pid)]) - 1

    def submit(self, island: str, command: str) -> str:
        """A job that asks for what every job of that island asks for."""
        asked = islands(self.config)[island].resources
        sent: str = self.client.submit_job(entrypoint=command, entrypoint_num_cpus=1, entrypoint_resources=asked)
        return sent

    def status(self, job: str) -> JobStatus:
        return self.client.get_job_status(job)

    def has_succeeded(self, *jobs: str) -> bool:
        return all(self.status(job) == JobStatus.SUCCEEDED for job in jobs)

    def withdraw(self, **most: int) -> None:
        """Change how many nodes there may be, as a cloud without any would; the autoscaler reads the file again."""
        nodes = {
            name: replace(node, max_nodes=most.get(name, node.max_nodes)) for name, node in self.config.nodes.items()
        }
        lifecycle.write_files(replace(self.config, nodes=nodes), self.folder)


def is_raylet(pid: int) -> bool:
    try:
        return b"/raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not until():
        assert time.monotonic() < deadline, f"{what} has not happened within {SOON_S} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("pool")
    own = (f"token_file={folder}/token", f"first_port={free_blocks(1, None)[0]}", "idle_minutes=0.05")
    config = shipped("local", *own)
    lifecycle.check(config, folder)
    lifecycle.up(config, folder)
    try:
        authorized = {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
        yield Pool(config, folder, JobSubmissionClient(config.address, headers=authorized))
    finally:
        if (folder / lifecycle.CONFIG).exists():
            lifecycle.down(config, folder)


def test_it_starts_with_no_node_and_refuses_who_has_no_token(pool):
    assert pool.nodes() == 0
    assert requests.get(f"{pool.config.address}/api/jobs/", timeout=10).status_code == 401
    assert {IslandClient(name, island).check_reachable() for name, island in islands(pool.config).items()} == {
        ray.__version__
    }
    with pytest.raises(PoolError, match="is up already"):
        lifecycle.check(pool.config, pool.folder)


def test_without_spot_work_waits_on_demand_works_and_when_spot_is_back_it_goes_on(pool):
    pool.withdraw(spot=0)
    spot = pool.submit("local_spot", "true")
    firm = pool.submit("local_on_demand", "true")
    wait(lambda: pool.has_succeeded(firm), "a node on demand")
    assert pool.status(spot) == JobStatus.PENDING
    pool.withdraw()
    wait(lambda: pool.has_succeeded(spot), "a spot node")


def test_nodes_come_for_each_job_that_waits_and_go_when_idle(pool, tmp_path):
    """The jobs meet, so each has a node of its own, and both nodes install our wheel at the same time."""
    wheel = build_wheel(tmp_path)
    spot, firm = (IslandClient(name, islands(pool.config)[name]) for name in ("local_spot", "local_on_demand"))

    def submit(mine: str, other: str) -> None:
        meet = f"touch {tmp_path}/{mine}; while [ ! -e {tmp_path}/{other} ]; do sleep 0.1; done"
        command = ["sh", "-c", f"python -c 'import ddm_core.artifacts' && {meet}"]
        assert spot.submit(mine, command, wheel=wheel, resources=ResourcesConfig(), env={}, grace_s=1)

    submit("one", "two")
    submit("two", "one")
    wait(lambda: ended(spot, "one", "two"), "two nodes at once")
    assert {name: spot.states()[name].status for name in ("one", "two")} == dict.fromkeys(("one", "two"), "SUCCEEDED")
    assert not {"one", "two"} & firm.states().keys()
    wait(lambda: pool.nodes() == 0, "the end of idle nodes")


def ended(island: IslandClient, *jobs: str) -> bool:
    states = island.states()
    return all(states[job].has_ended for job in jobs)


def test_down_ends_everything_even_what_does_not_want_to(pool):
    stubborn = pool.submit("local_on_demand", "trap '' TERM; setsid sleep 300 & wait; sleep 300")
    wait(lambda: pool.status(stubborn) == JobStatus.RUNNING, "a running job")
    assert len(marked_processes(str(pool.folder))) > 10
    lifecycle.down(pool.config, pool.folder)
    assert marked_processes(str(pool.folder)) == []
    assert free_blocks(1, pool.config.first_port) == [pool.config.first_port]
    with pytest.raises(PoolError, match="no pool was started"):
        lifecycle.is_started(pool.folder)


def test_a_port_in_use_is_named_before_anything(tmp_path):
    (first_port,) = free_blocks(1, None)
    config = shipped("local", f"token_file={tmp_path}/token", f"first_port={first_port}")
    with socket.socket() as taken:
        taken.bind((ADDRESS, first_port + 50))
        with pytest.raises(IslandError, match=f"need 100 free ports each, from {first_port} to {first_port + 99}"):
            lifecycle.check(config, tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
