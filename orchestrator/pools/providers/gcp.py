"""Google Cloud: files for Ray's cluster launcher, with machines that have no public address."""

from typing import Any

from orchestrator.pools.config import HeadConfig, NodeConfig, PoolConfig, hyphenate
from orchestrator.pools.providers.ray_launcher import build_launcher_config
from orchestrator.pools.yaml_text import to_yaml

SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def render_gcp(config: PoolConfig) -> dict[str, str]:
    """Return `pool.yaml` for `ray up`."""
    provider = {
        "type": "gcp",
        "region": config.region,
        "availability_zone": config.zones[0],
        "project_id": config.project,
    }

    def build_machine(machine: HeadConfig, spot: bool) -> dict[str, Any]:
        return _build_instance(config, machine, spot=spot)

    launcher = build_launcher_config(
        config, provider=provider, build_machine=build_machine, autoscaler=("google-api-python-client", "google-auth")
    )
    return {
        "pool.yaml": to_yaml(launcher, comment=f"Pool {config.name} for Ray's cluster launcher: `ray up pool.yaml`.")
    }


def _build_instance(config: PoolConfig, machine: HeadConfig, *, spot: bool) -> dict[str, Any]:
    """Return the arguments of Compute Engine's instances.insert; without access config there is no public address."""
    subnet = config.network.subnets[0]
    path = subnet if subnet.startswith("projects/") else f"projects/{config.project}/{subnet}"
    disk = {"diskSizeGb": machine.disk_gb, "sourceImage": config.machine_image}
    instance: dict[str, Any] = {
        "machineType": machine.machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        "networkInterfaces": [{"subnetwork": path}],
        "labels": {
            _format_label(key): _format_label(value) for key, value in {**config.tags, "ddm-pool": config.name}.items()
        },
        "metadata": {"items": [{"key": "install-nvidia-driver", "value": "True"}]},
        "scheduling": _build_scheduling(machine, spot=spot),
    }
    if config.identity:
        instance["serviceAccounts"] = [{"email": config.identity, "scopes": [SCOPE]}]
    if isinstance(machine, NodeConfig) and machine.accelerator:
        instance["guestAccelerators"] = [{"acceleratorType": machine.accelerator, "acceleratorCount": machine.gpus}]
    return instance


def _build_scheduling(machine: HeadConfig, *, spot: bool) -> dict[str, Any]:
    """Return the scheduling: a preempted spot machine is deleted, and a GPU machine cannot migrate while it runs."""
    if spot:
        return {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "onHostMaintenance": "TERMINATE",
            "automaticRestart": False,
        }
    has_gpu = isinstance(machine, NodeConfig) and machine.gpus > 0
    return {"provisioningModel": "STANDARD", "onHostMaintenance": "TERMINATE" if has_gpu else "MIGRATE"}


def _format_label(text: str) -> str:
    return hyphenate(text.lower())
