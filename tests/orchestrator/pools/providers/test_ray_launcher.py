"""What Ray's cluster launcher gets: valid to Ray itself, nothing left to its defaults, nothing open, no secret."""

import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.pools.providers.aws import GROUP_FILE
from orchestrator.pools.render import render
from tests.orchestrator.pools.pools import document, pools, shipped

CLOUDS = pytest.mark.parametrize("name", ["aws_spot", "gcp_spot"])
MERGED = {"setup_commands", "head_setup_commands", "worker_setup_commands"}


def accepted(written):
    """What Ray makes of a pool; it raises for what it does not accept."""
    prepared = prepare_config(written)
    validate_config(prepared)
    return prepared


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pools("aws_spot"))
def test_ray_accepts_any_pool_on_aws(config):
    written = document(config, "pool.yaml")
    assert_sizes(config, accepted(written))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pools("gcp_spot"))
def test_ray_accepts_any_pool_on_google(config):
    written = document(config, "pool.yaml")
    assert_sizes(config, accepted(written))


def assert_sizes(config, prepared):
    """The limits are the configuration's, and each type alone has its own resource."""
    types = prepared["available_node_types"]
    assert prepared["max_workers"] == sum(node.max_nodes for node in config.nodes.values())
    for name, node in config.nodes.items():
        assert (types[name]["min_workers"], types[name]["max_workers"]) == (node.min_nodes, node.max_nodes)
        assert types[name]["resources"].get("GPU", 0) == node.gpus
        assert [other for other in types if f"pool_{name}" in types[other]["resources"]] == [name]
    head = types[prepared["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)


@CLOUDS
def test_nothing_is_left_to_the_launchers_defaults(name):
    written = document(shipped(name), "pool.yaml")
    prepared = accepted(written)
    assert prepared.keys() == written.keys()
    assert {key for key in written if prepared[key] != written[key]} <= MERGED


@CLOUDS
def test_the_token_travels_as_a_file(name, tmp_path):
    (tmp_path / "token").write_text("a-secret-of-its-own")
    files = render(shipped(name, f"token_file={tmp_path}/token"))
    assert not [file for file, text in files.items() if "a-secret-of-its-own" in text]
    written = document(shipped(name, f"token_file={tmp_path}/token"), "pool.yaml")
    assert written["file_mounts"] == {"~/.ray/auth_token": f"{tmp_path}/token"}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert (
            "RAY_AUTH_MODE=token" in written[key][-1]
            and "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in written[key][-1]
        )


@CLOUDS
def test_no_machine_is_public(name):
    written = document(shipped(name), "pool.yaml")
    assert written["provider"]["use_internal_ips"] is True
    assert "--dashboard-host=127.0.0.1" in written["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in render(shipped(name))["pool.yaml"]
    for node_type in written["available_node_types"].values():
        interfaces = node_type["node_config"].get("networkInterfaces", [])
        assert not [interface for interface in interfaces if "accessConfigs" in interface]


@CLOUDS
def test_commands_are_shell(name):
    written = document(shipped(name), "pool.yaml")
    for command in [line for key in written if key.endswith("_commands") for line in written[key]]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_head_is_never_spot_and_nodes_are_what_they_say():
    aws = document(shipped("aws_spot"), "pool.yaml")["available_node_types"]
    assert [name for name, one in aws.items() if "InstanceMarketOptions" in one["node_config"]] == ["l4_spot"]
    google = document(shipped("gcp_spot"), "pool.yaml")["available_node_types"]
    models = {name: one["node_config"]["scheduling"]["provisioningModel"] for name, one in google.items()}
    assert models == {"head": "STANDARD", "l4_spot": "SPOT", "l4": "STANDARD"}


def test_everything_that_costs_is_tagged():
    for one in document(shipped("aws_spot"), "pool.yaml")["available_node_types"].values():
        tagged = {spec["ResourceType"]: {tag["Key"]: tag["Value"] for tag in spec["Tags"]} for spec in tags_of(one)}
        assert tagged == dict.fromkeys(["instance", "volume"], {"project": "ddm", "ddm-pool": "aws_spot"})
    for one in document(shipped("gcp_spot"), "pool.yaml")["available_node_types"].values():
        assert one["node_config"]["labels"] == {"project": "ddm", "ddm-pool": "gcp-spot"}


def tags_of(node_type):
    return node_type["node_config"]["TagSpecifications"]


def test_ssh_is_let_in_only_from_where_it_was_asked_for():
    def ingress(*overrides):
        return document(shipped("aws_spot", *overrides), GROUP_FILE)["Resources"]["Group"]["Properties"][
            "SecurityGroupIngress"
        ]

    assert ingress() == []
    (rule,) = ingress("network.ssh_source=10.2.0.0/16")
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, "10.2.0.0/16")


def test_a_group_of_ones_own_is_used_as_it_is():
    files = render(shipped("aws_spot", "network.security_group=sg-1"))
    assert GROUP_FILE not in files
    written = document(shipped("aws_spot", "network.security_group=sg-1"), "pool.yaml")
    assert "security_group" not in written["provider"]
    types = written["available_node_types"].values()
    assert all(one["node_config"]["SecurityGroupIds"] == ["sg-1"] for one in types)


def test_what_only_some_ask_for():
    aws = document(
        shipped("aws_spot", "identity=arn:aws:iam::1:instance-profile/x", "machine_image=ami-1"), "pool.yaml"
    )
    head = aws["available_node_types"]["head"]["node_config"]
    assert (head["IamInstanceProfile"], head["ImageId"]) == ({"Arn": "arn:aws:iam::1:instance-profile/x"}, "ami-1")
    asked = ("identity=a@b", "nodes.l4.accelerator=nvidia-tesla-t4", "network.ssh_proxy_command=")
    google = document(shipped("gcp_spot", *asked), "pool.yaml")
    node = google["available_node_types"]["l4"]["node_config"]
    assert node["guestAccelerators"] == [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 1}]
    assert node["serviceAccounts"][0]["email"] == "a@b"
    assert google["auth"] == {"ssh_user": "ubuntu"}
