"""Kubernetes through `kubectl`: a Secret with the token, a NetworkPolicy and a RayCluster."""

from pathlib import Path

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.kuberay import secret_name
from orchestrator.pools.tools import PoolError, answer, found, show

FILES = ("network_policy.yaml", "ray_cluster.yaml")


def check(config: PoolConfig, folder: Path) -> None:
    """`kubectl`, a Kubernetes that answers and lets us, and KubeRay in it."""
    kinds = answer([*_kubectl(config), "api-resources", "--api-group=ray.io", "--output=name"])
    if "rayclusters.ray.io" not in kinds.split():
        raise PoolError("this Kubernetes does not know RayCluster: install KubeRay 1.6 or later with Helm")
    allowed = [*_kubectl(config), "auth", "can-i", "create", "rayclusters.ray.io"]
    answer(allowed, way_out=f"ask for the right in namespace {config.kubernetes.namespace}")


def up(config: PoolConfig, folder: Path) -> None:
    """The Secret is made from the token's file, so the token is in no command and no YAML."""
    kubectl, secret = _kubectl(config), secret_name(config)
    show([*kubectl, "delete", "secret", secret, "--ignore-not-found"])
    show([*kubectl, "create", "secret", "generic", secret, f"--from-file=auth_token={config.token}"])
    for name in FILES:
        show([*kubectl, "apply", f"--filename={folder / name}"])


def down(config: PoolConfig, folder: Path) -> None:
    """Wait until the pods, which belong to the RayCluster, have ended; then remove the rest."""
    kubectl = _kubectl(config)
    for name in reversed(FILES):
        waiting = ["--ignore-not-found", "--cascade=foreground", "--timeout=300s"]
        show([*kubectl, "delete", f"--filename={folder / name}", *waiting])
    show([*kubectl, "delete", "secret", secret_name(config), "--ignore-not-found"])


def left(config: PoolConfig, folder: Path) -> list[str]:
    """Pods and Ray clusters that are still there."""
    kubectl, name = _kubectl(config), config.cluster_name
    pods = answer([*kubectl, "get", "pods", f"--selector=ray.io/cluster={name}", "--output=name"])
    cluster = answer([*kubectl, "get", "rayclusters.ray.io", name, "--ignore-not-found", "--output=name"])
    return [*cluster.split(), *pods.split()]


def _kubectl(config: PoolConfig) -> list[str]:
    tool = found("kubectl", "install it, and point it to your Kubernetes")
    return [tool, f"--namespace={config.kubernetes.namespace}"]
