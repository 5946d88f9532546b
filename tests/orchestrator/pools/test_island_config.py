"""Pool as islands: the printed configuration is valid for `ddm run`, with one island for each type."""

from dataclasses import replace

import pytest
import yaml
from pydantic import TypeAdapter

from orchestrator.config.compute import ComputeConfig
from orchestrator.pools.island_config import build_islands
from orchestrator.pools.render import render
from tests.orchestrator.pools.pools import FOLDER, SHIPPED, load_shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_rendered_islands_are_a_valid_configuration(name):
    config = load_shipped(name)
    document = yaml.safe_load(render(config)["islands.yaml"])
    parsed = TypeAdapter(ComputeConfig).validate_python(document)
    assert parsed.backend == "islands" and parsed.islands == build_islands(config)


def test_spot_and_on_demand_islands_share_one_ray_cluster():
    islands = build_islands(load_shipped("aws_spot", "token_file=/t/token"))
    spot, on_demand = islands["aws_spot_l4_spot"], islands["aws_spot_l4"]
    assert (spot.preemptible, on_demand.preemptible) == (True, False)
    assert (spot.resources, on_demand.resources) == ({"pool_l4_spot": 1.0}, {"pool_l4": 1.0})
    assert spot.address == on_demand.address == "http://127.0.0.1:8265"
    assert spot.token_file == on_demand.token_file == "/t/token"
    assert (spot.gpus, spot.cpus, spot.price_per_hour) == (8.0, 32, pytest.approx(2.8))


def test_disabled_type_is_no_island():
    assert list(build_islands(load_shipped("local", "nodes.spot.max_nodes=0"))) == ["local_on_demand"]


def test_skypilot_with_fallback_is_one_island():
    assert list(build_islands(load_shipped("skypilot"))) == ["skypilot_l4_spot"]


def test_local_pool_matches_compute_pool_local():
    changes = {"token_file": "~/.ddm/pools/local/token", "storage": "~/.ddm/pools/local/storage", "memory_gb": 0.0}
    expected = {name: replace(island, **changes) for name, island in build_islands(load_shipped("local")).items()}
    document = yaml.safe_load((FOLDER.parent / "compute" / "pool_local.yaml").read_text())
    assert TypeAdapter(ComputeConfig).validate_python(document).islands == expected
