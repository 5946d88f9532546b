"""AWS: Ray's cluster launcher, and the security group without which it would open ssh to the world."""

from typing import Any

from orchestrator.pools.config import HeadConfig, PoolConfig
from orchestrator.pools.providers.ray_launcher import launcher
from orchestrator.pools.yaml_text import as_yaml

GROUP_FILE = "security_group.yaml"


def render_aws(config: PoolConfig) -> dict[str, str]:
    """`pool.yaml` for `ray up`; `security_group.yaml` for CloudFormation unless a group is named.

    Ray finds the group by its name and leaves it alone, since it has rules.
    """
    network = config.network
    provider: dict[str, Any] = {"type": "aws", "region": config.region, "cache_stopped_nodes": False}
    if config.zones:
        provider["availability_zone"] = ",".join(config.zones)
    if not network.security_group:
        provider["security_group"] = {"GroupName": config.cluster_name}

    def machine(asked: HeadConfig, spot: bool) -> dict[str, Any]:
        return _instance(config, asked, spot=spot)

    written = launcher(config, provider=provider, machine=machine, autoscaler=("boto3",))
    files = {"pool.yaml": as_yaml(written, about=f"Pool {config.name} for Ray's cluster launcher: `ray up pool.yaml`.")}
    if not network.security_group:
        about = f"Security group of pool {config.name} for CloudFormation; `ddm pool up` makes it first."
        files[GROUP_FILE] = as_yaml(_security_group(config), about=about)
    return files


def _instance(config: PoolConfig, asked: HeadConfig, *, spot: bool) -> dict[str, Any]:
    """What EC2's RunInstances is asked for one machine."""
    disk = {"VolumeSize": asked.disk_gb, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    tags = [{"Key": key, "Value": value} for key, value in _tags(config).items()]
    written: dict[str, Any] = {
        "InstanceType": asked.machine,
        "ImageId": config.machine_image or "latest_dlami",
        "SubnetIds": list(config.network.subnets),
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required"},
        "TagSpecifications": [{"ResourceType": kind, "Tags": list(tags)} for kind in ("instance", "volume")],
    }
    if config.network.security_group:
        written["SecurityGroupIds"] = [config.network.security_group]
    if config.identity:
        written["IamInstanceProfile"] = {"Arn": config.identity}
    if spot:
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        written["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    return written


def _security_group(config: PoolConfig) -> dict[str, Any]:
    """A group whose members reach each other on every port; from outside ssh alone, and only if asked for."""
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": config.network.ssh_source}
    group = {
        "GroupName": config.cluster_name,
        "GroupDescription": f"Ray cluster {config.cluster_name}",
        "VpcId": config.network.vpc,
        "SecurityGroupIngress": [ssh] if config.network.ssh_source else [],
        "Tags": [{"Key": key, "Value": value} for key, value in _tags(config).items()],
    }
    itself = {"Fn::GetAtt": ["Group", "GroupId"]}
    members = {"GroupId": itself, "SourceSecurityGroupId": itself, "IpProtocol": "-1"}
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"Who may reach the nodes of pool {config.name}",
        "Resources": {
            "Group": {"Type": "AWS::EC2::SecurityGroup", "Properties": group},
            "Members": {"Type": "AWS::EC2::SecurityGroupIngress", "Properties": members},
        },
    }


def _tags(config: PoolConfig) -> dict[str, str]:
    return {**config.tags, "ddm-pool": config.name}
