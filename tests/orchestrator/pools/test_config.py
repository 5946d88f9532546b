"""Pool configuration: every file is valid, every mistake is reported with its remedy, limits are enforced."""

import tomllib
from pathlib import Path

import pytest
import ray
from hypothesis import given

from ddm_core.artifacts import to_jsonable
from orchestrator.errors import ConfigError
from orchestrator.pools.config import NodeConfig
from orchestrator.pools.load_config import load_pool, parse_pool
from orchestrator.pools.providers.node_setup import PACKAGES, PYTHON_VERSION, RAY_VERSION
from orchestrator.pools.render import RENDERERS
from tests.orchestrator.pools.pools import FOLDER, SHIPPED, load_shipped, pools

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pool_is_valid_and_scales_from_zero(name):
    config = load_shipped(name)
    assert config.name == name
    assert all(node.min_nodes == 0 for node in config.nodes.values())
    assert any(node.spot and node.fallback for node in config.nodes.values())


def test_every_provider_has_a_pool_and_a_renderer():
    assert {load_shipped(name).provider for name in SHIPPED} == set(RENDERERS)


@given(pools("aws_spot"))
def test_pool_config_round_trips_through_json(config):
    assert parse_pool(to_jsonable(config)) == config


def test_nodes_get_the_projects_requirements_and_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [text for text in project["dependencies"] if not text.startswith("ray")]
    assert list(PACKAGES) == [*requirements, *project["optional-dependencies"]["cloud"]]
    assert ray.__version__ == RAY_VERSION
    assert load_shipped("aws_spot").image == f"rayproject/ray:{RAY_VERSION}-py{PYTHON_VERSION.replace('.', '')}-gpu"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nodez=1", "nodez: unknown key; known here: .*idle_minutes.*nodes.*zones"),
        ("nodes.l4.gpuz=1", "nodes.l4.gpuz: unknown key; known here: .*gpus.*max_nodes"),
        ("head.machin=a", "head.machin: unknown key; known here: .*machine"),
        ("network.ssh=a", "network.ssh: unknown key; known here: .*ssh_source"),
        ("kubernetes.run=[a]", "run needs claim"),
        ("nodes.l4.min_nodes=9", "min_nodes=9 is more than max_nodes=2"),
        ("nodes.l4_spot.fallback=other", "fallback=other must be an on-demand type with 1 L4"),
        ("nodes.l4_spot.fallback=l4_spot", "must be an on-demand type"),
        ("nodes.l4.gpus=2", "fallback=l4 must be an on-demand type with 1 L4"),
        ("nodes.l4.fallback=l4_spot", "needs spot=true"),
        ("nodes.l4.gpu=", "a node with GPUs needs both"),
        ("nodes.l4.machine=", "needs nodes.l4.machine"),
        ("region=", "provider=aws needs region"),
        ("network.vpc=", "needs network.vpc, or an existing network.security_group"),
        ("network.ssh_source=0.0.0.0/0", "is too large a part of the internet"),
        ("network.ssh_source=::/0", "is too large a part of the internet"),
        ("network.ssh_source=office", "does not appear to be an IPv4 or IPv6 network"),
        ("idle_minutes=0", "idle_minutes: .*greater than 0"),
        ("max_price_per_hour=1", "all nodes together cost 4.53 an hour and max_price_per_hour=1"),
        ("name=../x", "name: .*pattern"),
        ("provider=azure", "provider: .*'aws', 'gcp', 'kuberay', 'skypilot' or 'local'"),
    ],
)
def test_invalid_override_raises_with_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        load_shipped("aws_spot", override)


def test_all_mistakes_are_reported_together():
    invalid = {"nodez": 1, "idle_minutes": 0, "first_port": 1}
    with pytest.raises(ConfigError, match="(?s)3 mistake.*idle_minutes.*first_port.*nodez: unknown key"):
        parse_pool({"name": "a", "provider": "local", "nodes": {"x": {}}, **invalid})
    with pytest.raises(ConfigError, match="nodes: .*at least 1 item"):
        parse_pool({"name": "a", "provider": "local", "nodes": {}})


def test_unknown_pool_and_invalid_overrides_raise(tmp_path):
    with pytest.raises(ConfigError, match="no pool 'azure'; known: aws_spot, gcp_spot, kuberay, local, skypilot"):
        load_shipped("azure")
    with pytest.raises(ConfigError, match="key=value.*given: cheap"):
        load_shipped("local", "cheap")
    with pytest.raises(ConfigError, match="not_there"):
        load_shipped("local", "name=${not_there}")


def test_pool_from_a_custom_file_is_loaded(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("provider: local\nnodes: {cpu: {cpus: 3, max_nodes: 5}}\n")
    config = load_pool(FOLDER, str(path), ["nodes.cpu.max_nodes=4"])
    assert (config.name, config.nodes) == ("mine", {"cpu": NodeConfig(cpus=3, max_nodes=4)})


def test_max_cost_is_the_price_of_all_nodes():
    config = load_shipped("aws_spot", "nodes.l4.max_nodes=3")
    assert config.max_cost_per_hour == pytest.approx(0.11 + 8 * 0.35 + 3 * 0.81)
