"""What Google Cloud itself says: whether it knows us, and which machines of a pool it still has."""

from typing import Any

from orchestrator.pools.shell import PoolError, require_library

WAY_OUT = "run `pip install google-api-python-client google-auth`"


def check_account(project: str) -> None:
    """Raise `PoolError` unless Google accepts our credentials for the project."""
    machines(project, "ddm-none")


def machines(project: str, cluster_name: str) -> list[str]:
    """Instances of a Ray cluster in any zone and state; raises `PoolError` without an answer."""
    discovery = require_library("googleapiclient.discovery", WAY_OUT)
    refused = require_library("googleapiclient.errors", WAY_OUT).Error
    unknown = require_library("google.auth.exceptions", WAY_OUT).GoogleAuthError
    chosen = f"labels.ray-cluster-name={cluster_name}"
    try:
        asked = discovery.build("compute", "v1").instances().aggregatedList(project=project, filter=chosen)
        return _names(asked.execute())
    except (refused, unknown, OSError) as error:
        way_out = "run `gcloud auth application-default login`"
        raise PoolError(f"Google Cloud refuses or does not answer: {error}; {way_out}") from error


def _names(answer: dict[str, Any]) -> list[str]:
    zones = answer.get("items", {}).values()
    return [str(instance["name"]) for zone in zones for instance in zone.get("instances", [])]
