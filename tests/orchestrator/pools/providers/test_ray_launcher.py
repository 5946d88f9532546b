"""Files for Ray's cluster launcher: valid for Ray, without use of its defaults, open ports or secrets."""

import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.pools.providers.aws import GROUP_FILE
from orchestrator.pools.render import render
from tests.orchestrator.pools.pools import load_shipped, pools, render_document

CLOUDS = pytest.mark.parametrize("name", ["aws_spot", "gcp_spot"])
MERGED = {"setup_commands", "head_setup_commands", "worker_setup_commands"}


def prepare(launcher):
    """Return the configuration as Ray completes it; Ray raises for an invalid one."""
    prepared = prepare_config(launcher)
    validate_config(prepared)
    return prepared


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pools("aws_spot"))
def test_any_pool_on_aws_is_valid_for_ray(config):
    launcher = render_document(config, "pool.yaml")
    assert_sizes(config, prepare(launcher))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pools("gcp_spot"))
def test_any_pool_on_gcp_is_valid_for_ray(config):
    launcher = render_document(config, "pool.yaml")
    assert_sizes(config, prepare(launcher))


def assert_sizes(config, prepared):
    """Assert that limits match the configuration, and that each type has a resource of its own."""
    types = prepared["available_node_types"]
    assert prepared["max_workers"] == sum(node.max_nodes for node in config.nodes.values())
    for name, node in config.nodes.items():
        assert (types[name]["min_workers"], types[name]["max_workers"]) == (node.min_nodes, node.max_nodes)
        assert types[name]["resources"].get("GPU", 0) == node.gpus
        assert [other for other in types if f"pool_{name}" in types[other]["resources"]] == [name]
    head = types[prepared["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)


@CLOUDS
def test_launcher_defaults_are_not_used(name):
    launcher = render_document(load_shipped(name), "pool.yaml")
    prepared = prepare(launcher)
    assert prepared.keys() == launcher.keys()
    assert {key for key in launcher if prepared[key] != launcher[key]} <= MERGED


@CLOUDS
def test_token_is_sent_as_a_file(name, tmp_path):
    (tmp_path / "token").write_text("a-secret-of-its-own")
    files = render(load_shipped(name, f"token_file={tmp_path}/token"))
    assert not [file for file, text in files.items() if "a-secret-of-its-own" in text]
    launcher = render_document(load_shipped(name, f"token_file={tmp_path}/token"), "pool.yaml")
    assert launcher["file_mounts"] == {"~/.ray/auth_token": f"{tmp_path}/token"}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert (
            "RAY_AUTH_MODE=token" in launcher[key][-1]
            and "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in launcher[key][-1]
        )


@CLOUDS
def test_no_machine_has_a_public_address(name):
    launcher = render_document(load_shipped(name), "pool.yaml")
    assert launcher["provider"]["use_internal_ips"] is True
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in render(load_shipped(name))["pool.yaml"]
    for node_type in launcher["available_node_types"].values():
        interfaces = node_type["node_config"].get("networkInterfaces", [])
        assert not [interface for interface in interfaces if "accessConfigs" in interface]


@CLOUDS
def test_commands_are_valid_shell(name):
    launcher = render_document(load_shipped(name), "pool.yaml")
    for command in [line for key in launcher if key.endswith("_commands") for line in launcher[key]]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_head_is_on_demand_and_nodes_follow_their_type():
    aws = render_document(load_shipped("aws_spot"), "pool.yaml")["available_node_types"]
    assert [name for name, node in aws.items() if "InstanceMarketOptions" in node["node_config"]] == ["l4_spot"]
    google = render_document(load_shipped("gcp_spot"), "pool.yaml")["available_node_types"]
    models = {name: node["node_config"]["scheduling"]["provisioningModel"] for name, node in google.items()}
    assert models == {"head": "STANDARD", "l4_spot": "SPOT", "l4": "STANDARD"}


def test_all_billed_resources_are_tagged():
    for node_type in render_document(load_shipped("aws_spot"), "pool.yaml")["available_node_types"].values():
        tagged = {
            spec["ResourceType"]: {tag["Key"]: tag["Value"] for tag in spec["Tags"]} for spec in get_tags(node_type)
        }
        assert tagged == dict.fromkeys(["instance", "volume"], {"project": "ddm", "ddm-pool": "aws_spot"})
    for node_type in render_document(load_shipped("gcp_spot"), "pool.yaml")["available_node_types"].values():
        assert node_type["node_config"]["labels"] == {"project": "ddm", "ddm-pool": "gcp-spot"}


def get_tags(node_type):
    return node_type["node_config"]["TagSpecifications"]


def test_ssh_is_open_only_to_the_configured_source():
    def ingress(*overrides):
        return render_document(load_shipped("aws_spot", *overrides), GROUP_FILE)["Resources"]["Group"]["Properties"][
            "SecurityGroupIngress"
        ]

    assert ingress() == []
    (rule,) = ingress("network.ssh_source=10.2.0.0/16")
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, "10.2.0.0/16")


def test_configured_security_group_is_used():
    files = render(load_shipped("aws_spot", "network.security_group=sg-1"))
    assert GROUP_FILE not in files
    launcher = render_document(load_shipped("aws_spot", "network.security_group=sg-1"), "pool.yaml")
    assert "security_group" not in launcher["provider"]
    types = launcher["available_node_types"].values()
    assert all(node_type["node_config"]["SecurityGroupIds"] == ["sg-1"] for node_type in types)


def test_optional_keys_are_rendered():
    aws = render_document(
        load_shipped("aws_spot", "identity=arn:aws:iam::1:instance-profile/x", "machine_image=ami-1"), "pool.yaml"
    )
    head = aws["available_node_types"]["head"]["node_config"]
    assert (head["IamInstanceProfile"], head["ImageId"]) == ({"Arn": "arn:aws:iam::1:instance-profile/x"}, "ami-1")
    overrides = ("identity=a@b", "nodes.l4.accelerator=nvidia-tesla-t4", "network.ssh_proxy_command=")
    google = render_document(load_shipped("gcp_spot", *overrides), "pool.yaml")
    node = google["available_node_types"]["l4"]["node_config"]
    assert node["guestAccelerators"] == [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 1}]
    assert node["serviceAccounts"][0]["email"] == "a@b"
    assert google["auth"] == {"ssh_user": "ubuntu"}
