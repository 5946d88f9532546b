"""Query AWS for this account and for a pool's remaining machines; the only file with boto3."""

from collections.abc import Callable
from typing import Any

from orchestrator.pools.shell import PoolError, require_library


def check_account(region: str) -> None:
    """Raise `PoolError` unless AWS accepts the credentials."""
    _call(region, "sts", lambda client: client.get_caller_identity())


def list_machines(region: str, cluster_name: str) -> list[str]:
    """Return the ids of a Ray cluster's instances that are not terminated; raise `PoolError` without a response."""
    filters = [
        {"Name": "tag:ray-cluster-name", "Values": [cluster_name]},
        {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped", "shutting-down"]},
    ]
    pages = _call(region, "ec2", lambda client: list(_paginate(client, filters)))
    reservations = [reservation for page in pages for reservation in page["Reservations"]]
    return [str(instance["InstanceId"]) for reservation in reservations for instance in reservation["Instances"]]


def _paginate(client: Any, filters: list[dict[str, Any]]) -> Any:
    return client.get_paginator("describe_instances").paginate(Filters=filters)


def _call(region: str, service: str, request: Callable[[Any], Any]) -> Any:
    boto3 = require_library("boto3", "run `pip install boto3`")
    errors = require_library("botocore.exceptions", "run `pip install boto3`")
    try:
        return request(boto3.Session(region_name=region).client(service))
    except (errors.BotoCoreError, errors.ClientError) as error:
        raise PoolError(f"AWS refuses or does not respond: {error}; run `aws configure`") from error
