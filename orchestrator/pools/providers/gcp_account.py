"""Query Google Cloud for this account and for a pool's remaining machines."""

from typing import Any

from orchestrator.pools.shell import PoolError, require_library

INSTALL = "run `pip install google-api-python-client google-auth`"


def check_account(project: str) -> None:
    """Raise `PoolError` unless Google accepts the credentials for the project."""
    list_machines(project, "ddm-none")


def list_machines(project: str, cluster_name: str) -> list[str]:
    """Return the names of a Ray cluster's instances in any zone and state; raise `PoolError` without a response."""
    discovery = require_library("googleapiclient.discovery", INSTALL)
    refusal = require_library("googleapiclient.errors", INSTALL).Error
    auth_error = require_library("google.auth.exceptions", INSTALL).GoogleAuthError
    label_filter = f"labels.ray-cluster-name={cluster_name}"
    try:
        request = discovery.build("compute", "v1").instances().aggregatedList(project=project, filter=label_filter)
        return _list_names(request.execute())
    except (refusal, auth_error, OSError) as error:
        remedy = "run `gcloud auth application-default login`"
        raise PoolError(f"Google Cloud refuses or does not respond: {error}; {remedy}") from error


def _list_names(response: dict[str, Any]) -> list[str]:
    zones = response.get("items", {}).values()
    return [str(instance["name"]) for zone in zones for instance in zone.get("instances", [])]
