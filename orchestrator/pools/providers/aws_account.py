"""What AWS itself says: whether it knows us, and which machines of a pool it still has. The one file with boto3."""

from collections.abc import Callable
from typing import Any

from orchestrator.pools.shell import PoolError, require_library


def check_account(region: str) -> None:
    """Raise `PoolError` unless AWS accepts our credentials."""
    _asked(region, "sts", lambda client: client.get_caller_identity())


def machines(region: str, cluster_name: str) -> list[str]:
    """Instances of a Ray cluster that are not terminated; raises `PoolError` without an answer."""
    filters = [
        {"Name": "tag:ray-cluster-name", "Values": [cluster_name]},
        {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped", "shutting-down"]},
    ]
    pages = _asked(region, "ec2", lambda client: list(_pages(client, filters)))
    groups = [group for page in pages for group in page["Reservations"]]
    return [str(instance["InstanceId"]) for group in groups for instance in group["Instances"]]


def _pages(client: Any, filters: list[dict[str, Any]]) -> Any:
    return client.get_paginator("describe_instances").paginate(Filters=filters)


def _asked(region: str, service: str, question: Callable[[Any], Any]) -> Any:
    boto3 = require_library("boto3", "run `pip install boto3`")
    errors = require_library("botocore.exceptions", "run `pip install boto3`")
    try:
        return question(boto3.Session(region_name=region).client(service))
    except (errors.BotoCoreError, errors.ClientError) as error:
        raise PoolError(f"AWS refuses or does not answer: {error}; run `aws configure`") from error
