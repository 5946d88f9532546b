"""A pool as islands: what is printed is what `ddm run` takes, one island for each type."""

from dataclasses import replace

import pytest
import yaml
from pydantic import TypeAdapter

from orchestrator.config.compute import ComputeConfig
from orchestrator.pools.island_config import islands
from orchestrator.pools.render import render
from tests.orchestrator.pools.pools import FOLDER, SHIPPED, shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_printed_is_a_configuration(name):
    config = shipped(name)
    written = yaml.safe_load(render(config)["islands.yaml"])
    parsed = TypeAdapter(ComputeConfig).validate_python(written)
    assert parsed.backend == "islands" and parsed.islands == islands(config)


def test_spot_and_on_demand_are_islands_of_one_ray_cluster():
    found = islands(shipped("aws_spot", "token_file=/t/token"))
    spot, firm = found["aws_spot_l4_spot"], found["aws_spot_l4"]
    assert (spot.preemptible, firm.preemptible) == (True, False)
    assert (spot.resources, firm.resources) == ({"pool_l4_spot": 1.0}, {"pool_l4": 1.0})
    assert spot.address == firm.address == "http://127.0.0.1:8265"
    assert spot.token_file == firm.token_file == "/t/token"
    assert (spot.gpus, spot.cpus, spot.price_per_hour) == (8.0, 32, pytest.approx(2.8))


def test_a_withdrawn_type_is_no_island():
    assert list(islands(shipped("local", "nodes.spot.max_nodes=0"))) == ["local_on_demand"]


def test_skypilot_falls_back_inside_one_island():
    assert list(islands(shipped("skypilot"))) == ["skypilot_l4_spot"]


def test_the_pool_on_this_machine_ships_as_compute_pool_local():
    own = {"token_file": "~/.ddm/pools/local/token", "storage": "~/.ddm/pools/local/storage", "memory_gb": 0.0}
    expected = {name: replace(island, **own) for name, island in islands(shipped("local")).items()}
    written = yaml.safe_load((FOLDER.parent / "compute" / "pool_local.yaml").read_text())
    assert TypeAdapter(ComputeConfig).validate_python(written).islands == expected
