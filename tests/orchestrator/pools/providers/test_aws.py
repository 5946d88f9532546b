"""AWS on a real server on loopback: Ray's launcher with a rendered pool, and the remaining machines."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.providers import aws_account, cloud
from orchestrator.pools.providers.aws import GROUP_FILE
from orchestrator.pools.render import render
from orchestrator.pools.shell import PoolError
from tests.orchestrator.pools.pools import load_shipped, render_document

REGION = "us-east-1"


@dataclass(frozen=True)
class Account:
    """An AWS account with a network and the pool's security group in it."""

    config: PoolConfig
    ec2: Any
    vpc: str

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rules of every security group except the default one."""
        groups = self.ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [self.vpc]}])["SecurityGroups"]
        return {group["GroupName"]: group["IpPermissions"] for group in groups if group["GroupName"] != "default"}

    def instances(self) -> list[dict[str, Any]]:
        reservations = self.ec2.describe_instances()["Reservations"]
        return [instance for reservation in reservations for instance in reservation["Instances"]]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory) -> Iterator[str]:
    """Yield one server for all tests, because Ray caches its connections for the lifetime of the process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def account(endpoint) -> Account:
    requests.post(f"{endpoint}/moto-api/reset", timeout=10).raise_for_status()
    ec2 = boto3.client("ec2", region_name=REGION)
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    zones = {"us-east-1a": "10.0.1.0/24", "us-east-1b": "10.0.2.0/24"}
    created = [ec2.create_subnet(VpcId=vpc, CidrBlock=zones[zone], AvailabilityZone=zone) for zone in zones]
    subnets = ",".join(subnet["Subnet"]["SubnetId"] for subnet in created)
    profile = boto3.client("iam", region_name=REGION).create_instance_profile(InstanceProfileName="ddm")
    identity = profile["InstanceProfile"]["Arn"]
    overrides = (f"network.vpc={vpc}", f"network.subnets=[{subnets}]", f"identity={identity}")
    config = load_shipped("aws_spot", "network.ssh_proxy_command=", *overrides)
    formation = boto3.client("cloudformation", region_name=REGION)
    formation.create_stack(StackName=config.cluster_name, TemplateBody=render(config)[GROUP_FILE])
    return Account(config, ec2, vpc)


def launch(provider: AWSNodeProvider, prepared: dict[str, Any], node_type: str, kind: str) -> None:
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: node_type}
    tags |= {TAG_RAY_NODE_NAME: kind, TAG_RAY_NODE_STATUS: "uninitialized"}
    provider.create_node(copy.deepcopy(prepared["available_node_types"][node_type]["node_config"]), tags, 1)


@pytest.mark.integration
def test_launcher_keeps_the_group_and_starts_private_nodes(account, tmp_path):
    before = account.groups()
    prepared = bootstrap_aws(prepare_config(render_document(account.config, "pool.yaml")))
    assert account.groups() == before and list(before) == ["ddm-aws-spot"]
    assert [rule["IpProtocol"] for rule in before["ddm-aws-spot"]] == ["-1"]
    assert not [rule for rule in before["ddm-aws-spot"] if rule["IpRanges"]]

    assert cloud.remaining_aws(account.config, tmp_path) == []
    provider = AWSNodeProvider(prepared["provider"], prepared["cluster_name"])
    for node_type, kind in (("head", "head"), ("l4_spot", "worker"), ("l4", "worker")):
        launch(provider, prepared, node_type, kind)
    types = {instance["InstanceType"] for instance in account.instances()}
    assert types == {"m7i.large", "g6.xlarge"}
    markets = sorted(instance.get("InstanceLifecycle", "on-demand") for instance in account.instances())
    assert markets == ["on-demand", "on-demand", "spot"]
    for instance in account.instances():
        assert "PublicIpAddress" not in instance
        assert [group["GroupName"] for group in instance["SecurityGroups"]] == ["ddm-aws-spot"]
        assert {"Key": "ddm-pool", "Value": "aws_spot"} in instance["Tags"]

    ids = [instance["InstanceId"] for instance in account.instances()]
    assert sorted(cloud.remaining_aws(account.config, tmp_path)) == sorted(ids)
    account.ec2.stop_instances(InstanceIds=ids[:1])
    assert sorted(cloud.remaining_aws(account.config, tmp_path)) == sorted(ids)
    account.ec2.terminate_instances(InstanceIds=ids)
    assert cloud.remaining_aws(account.config, tmp_path) == []


@pytest.mark.integration
def test_launcher_without_the_group_opens_ssh_to_everyone(account):
    """This is the reason for the group: if Ray changes it, the group is no longer needed."""
    launcher = render_document(account.config, "pool.yaml")
    launcher["provider"]["security_group"] = {"GroupName": "another"}
    bootstrap_aws(prepare_config(launcher))
    sources = [span["CidrIp"] for rule in account.groups()["another"] for span in rule["IpRanges"]]
    assert sources == ["0.0.0.0/0"]


def test_aws_that_refuses_or_is_unreachable_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PoolError, match="AWS refuses or does not respond: Unable to locate credentials; run `aws conf"):
        aws_account.check_account(REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(PoolError, match="AWS refuses or does not respond: Could not connect"):
        aws_account.list_machines(REGION, "ddm-x")
