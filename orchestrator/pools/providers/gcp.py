"""Google Cloud: Ray's cluster launcher, machines without an address outside."""

from typing import Any

from orchestrator.pools.config import HeadConfig, NodeConfig, PoolConfig, dashed
from orchestrator.pools.providers.ray_launcher import launcher
from orchestrator.pools.yaml_text import as_yaml

SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def render_gcp(config: PoolConfig) -> dict[str, str]:
    """`pool.yaml` for `ray up`."""
    provider = {
        "type": "gcp",
        "region": config.region,
        "availability_zone": config.zones[0],
        "project_id": config.project,
    }

    def machine(asked: HeadConfig, spot: bool) -> dict[str, Any]:
        return _instance(config, asked, spot=spot)

    written = launcher(
        config, provider=provider, machine=machine, autoscaler=("google-api-python-client", "google-auth")
    )
    return {"pool.yaml": as_yaml(written, about=f"Pool {config.name} for Ray's cluster launcher: `ray up pool.yaml`.")}


def _instance(config: PoolConfig, asked: HeadConfig, *, spot: bool) -> dict[str, Any]:
    """What Compute Engine's instances.insert is asked for one machine; no access config is no public address."""
    subnet = config.network.subnets[0]
    path = subnet if subnet.startswith("projects/") else f"projects/{config.project}/{subnet}"
    disk = {"diskSizeGb": asked.disk_gb, "sourceImage": config.machine_image}
    written: dict[str, Any] = {
        "machineType": asked.machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        "networkInterfaces": [{"subnetwork": path}],
        "labels": {_label(key): _label(value) for key, value in {**config.tags, "ddm-pool": config.name}.items()},
        "metadata": {"items": [{"key": "install-nvidia-driver", "value": "True"}]},
        "scheduling": _scheduling(asked, spot=spot),
    }
    if config.identity:
        written["serviceAccounts"] = [{"email": config.identity, "scopes": [SCOPE]}]
    if isinstance(asked, NodeConfig) and asked.accelerator:
        written["guestAccelerators"] = [{"acceleratorType": asked.accelerator, "acceleratorCount": asked.gpus}]
    return written


def _scheduling(asked: HeadConfig, *, spot: bool) -> dict[str, Any]:
    """A spot machine that is taken away is deleted; a machine with a GPU cannot be moved while it runs."""
    if spot:
        return {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "onHostMaintenance": "TERMINATE",
            "automaticRestart": False,
        }
    has_gpu = isinstance(asked, NodeConfig) and asked.gpus > 0
    return {"provisioningModel": "STANDARD", "onHostMaintenance": "TERMINATE" if has_gpu else "MIGRATE"}


def _label(text: str) -> str:
    return dashed(text.lower())
