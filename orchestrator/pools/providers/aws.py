"""AWS: files for Ray's cluster launcher, and for a security group because the launcher's own opens ssh to everyone."""

from typing import Any

from orchestrator.pools.config import HeadConfig, PoolConfig
from orchestrator.pools.providers.ray_launcher import build_launcher_config
from orchestrator.pools.yaml_text import to_yaml

GROUP_FILE = "security_group.yaml"


def render_aws(config: PoolConfig) -> dict[str, str]:
    """Return `pool.yaml` for `ray up`, and `security_group.yaml` for CloudFormation unless a group is configured.

    Ray finds the group by its name and does not change it, because it has rules.
    """
    network = config.network
    provider: dict[str, Any] = {"type": "aws", "region": config.region, "cache_stopped_nodes": False}
    if config.zones:
        provider["availability_zone"] = ",".join(config.zones)
    if not network.security_group:
        provider["security_group"] = {"GroupName": config.cluster_name}

    def build_machine(machine: HeadConfig, spot: bool) -> dict[str, Any]:
        return _build_instance(config, machine, spot=spot)

    launcher = build_launcher_config(config, provider=provider, build_machine=build_machine, autoscaler=("boto3",))
    files = {
        "pool.yaml": to_yaml(launcher, comment=f"Pool {config.name} for Ray's cluster launcher: `ray up pool.yaml`.")
    }
    if not network.security_group:
        comment = f"Security group of pool {config.name} for CloudFormation; `ddm pool up` creates it first."
        files[GROUP_FILE] = to_yaml(_build_security_group(config), comment=comment)
    return files


def _build_instance(config: PoolConfig, machine: HeadConfig, *, spot: bool) -> dict[str, Any]:
    """Return the arguments of EC2's RunInstances for one machine."""
    disk = {"VolumeSize": machine.disk_gb, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    tags = [{"Key": key, "Value": value} for key, value in _build_tags(config).items()]
    instance: dict[str, Any] = {
        "InstanceType": machine.machine,
        "ImageId": config.machine_image or "latest_dlami",
        "SubnetIds": list(config.network.subnets),
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required"},
        "TagSpecifications": [{"ResourceType": kind, "Tags": list(tags)} for kind in ("instance", "volume")],
    }
    if config.network.security_group:
        instance["SecurityGroupIds"] = [config.network.security_group]
    if config.identity:
        instance["IamInstanceProfile"] = {"Arn": config.identity}
    if spot:
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        instance["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    return instance


def _build_security_group(config: PoolConfig) -> dict[str, Any]:
    """Return a group whose members reach each other on every port; from outside only ssh, and only if configured."""
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": config.network.ssh_source}
    group = {
        "GroupName": config.cluster_name,
        "GroupDescription": f"Ray cluster {config.cluster_name}",
        "VpcId": config.network.vpc,
        "SecurityGroupIngress": [ssh] if config.network.ssh_source else [],
        "Tags": [{"Key": key, "Value": value} for key, value in _build_tags(config).items()],
    }
    group_id = {"Fn::GetAtt": ["Group", "GroupId"]}
    members = {"GroupId": group_id, "SourceSecurityGroupId": group_id, "IpProtocol": "-1"}
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"Network access to the nodes of pool {config.name}",
        "Resources": {
            "Group": {"Type": "AWS::EC2::SecurityGroup", "Properties": group},
            "Members": {"Type": "AWS::EC2::SecurityGroupIngress", "Properties": members},
        },
    }


def _build_tags(config: PoolConfig) -> dict[str, str]:
    return {**config.tags, "ddm-pool": config.name}
