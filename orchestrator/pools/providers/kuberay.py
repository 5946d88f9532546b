"""Kubernetes: a RayCluster that KubeRay keeps, a NetworkPolicy around it, and a RayJob that brings its own Ray cluster.

KubeRay hands the token to its containers from a Secret, which `ddm pool up` makes from the token's file.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from orchestrator.pools.config import HeadConfig, NodeConfig, PoolConfig, dashed
from orchestrator.pools.providers.node_setup import RAY_VERSION
from orchestrator.pools.providers.ray_launcher import resource
from orchestrator.pools.shell import PoolError, require_tool, run_command, tool_output
from orchestrator.pools.yaml_text import as_yaml

LABEL = "ddm-pool"
RUNS = "/runs"
GROUP = "ray.io/v1"


def render_kuberay(config: PoolConfig) -> dict[str, str]:
    """`network_policy.yaml`, `ray_cluster.yaml`, and `ray_job.yaml` if `kubernetes.run` names a run."""
    cluster = {"apiVersion": GROUP, "kind": "RayCluster", "metadata": _named(config), "spec": _cluster(config)}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _named(config),
        "spec": _policy(config),
    }
    files = {
        "network_policy.yaml": as_yaml(policy, about=f"Who may reach pool {config.name}: its own pods and KubeRay."),
        "ray_cluster.yaml": as_yaml(cluster, about=f"Pool {config.name} for KubeRay 1.6 or later."),
    }
    if config.kubernetes.run:
        job = {"apiVersion": GROUP, "kind": "RayJob", "metadata": _named(config), "spec": _job(config)}
        about = f"A run on a Ray cluster of its own, like pool {config.name}: `kubectl create -f ray_job.yaml`."
        files["ray_job.yaml"] = as_yaml(job, about=about)
    return files


def secret_name(config: PoolConfig) -> str:
    """Name of the Secret with the token, under the key `auth_token`."""
    return f"{config.cluster_name}-token"


def _named(config: PoolConfig) -> dict[str, Any]:
    return {"name": config.cluster_name, "namespace": config.kubernetes.namespace, "labels": _labels(config)}


def _labels(config: PoolConfig) -> dict[str, str]:
    return {**config.tags, LABEL: config.name}


def _cluster(config: PoolConfig) -> dict[str, Any]:
    head = {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _pod(config, "ray-head", config.head, gpus=0),
    }
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": secret_name(config)},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": round(config.idle_minutes * 60), "upscalingMode": "Default"},
        "headGroupSpec": head,
        "workerGroupSpecs": [_group(config, name, node) for name, node in config.nodes.items()],
    }


def _group(config: PoolConfig, name: str, node: NodeConfig) -> dict[str, Any]:
    own = json.dumps(json.dumps({resource(name): node.slots}))  # quoted twice: KubeRay puts it into a shell command
    return {
        "groupName": dashed(name),
        "replicas": node.min_nodes,
        "minReplicas": node.min_nodes,
        "maxReplicas": node.max_nodes,
        "rayStartParams": {"resources": own},
        "template": _pod(config, "ray-worker", node, gpus=node.gpus),
    }


def _pod(config: PoolConfig, container: str, asked: HeadConfig, *, gpus: int) -> dict[str, Any]:
    """A pod template; the container may not become root, and gets what it asks for and no more."""
    amounts = {"cpu": str(asked.cpus), "memory": f"{asked.memory_gb:g}Gi", "ephemeral-storage": f"{asked.disk_gb}Gi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    main: dict[str, Any] = {
        "name": container,
        "image": config.image,
        "env": [{"name": "RAY_JOB_START_TIMEOUT_SECONDS", "value": f"{config.start_timeout_s:.0f}"}],
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 1000,
        },
    }
    pod: dict[str, Any] = {"containers": [main]}
    if config.kubernetes.claim:
        main["volumeMounts"] = [{"name": "runs", "mountPath": RUNS}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": config.kubernetes.claim}}]
    if asked.selector:
        pod["nodeSelector"] = dict(asked.selector)
    if gpus:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in config.kubernetes.tolerations]
    return {"metadata": {"labels": _labels(config)}, "spec": pod}


def _job(config: PoolConfig) -> dict[str, Any]:
    """KubeRay submits over HTTP from its own namespace, and the Ray cluster goes when the run ends."""
    own = ("compute=ray_local", "compute.address=auto", f"folder={RUNS}/{config.name}")
    return {
        "entrypoint": shlex.join(["ddm", "run", *own, *config.kubernetes.run]),
        "submissionMode": "HTTPMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 60,
        "backoffLimit": 0,
        "rayClusterSpec": _cluster(config),
    }


def _policy(config: PoolConfig) -> dict[str, Any]:
    members = {"podSelector": {"matchLabels": {LABEL: config.name}}}
    operator = {"kubernetes.io/metadata.name": config.kubernetes.operator_namespace}
    return {
        **members,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [members]},
            {
                "from": [{"namespaceSelector": {"matchLabels": operator}}],
                "ports": [{"protocol": "TCP", "port": 8265}],
            },
        ],
    }


FILES = ("network_policy.yaml", "ray_cluster.yaml")


def check(config: PoolConfig, folder: Path) -> None:
    """`kubectl`, a Kubernetes that answers and lets us, and KubeRay in it."""
    kinds = tool_output([*_kubectl(config), "api-resources", "--api-group=ray.io", "--output=name"])
    if "rayclusters.ray.io" not in kinds.split():
        raise PoolError("this Kubernetes does not know RayCluster: install KubeRay 1.6 or later with Helm")
    allowed = [*_kubectl(config), "auth", "can-i", "create", "rayclusters.ray.io"]
    tool_output(allowed, way_out=f"ask for the right in namespace {config.kubernetes.namespace}")


def up(config: PoolConfig, folder: Path) -> None:
    """The Secret is made from the token's file, so the token is in no command and no YAML."""
    kubectl, secret = _kubectl(config), secret_name(config)
    run_command([*kubectl, "delete", "secret", secret, "--ignore-not-found"])
    run_command([*kubectl, "create", "secret", "generic", secret, f"--from-file=auth_token={config.token}"])
    for name in FILES:
        run_command([*kubectl, "apply", f"--filename={folder / name}"])


def down(config: PoolConfig, folder: Path) -> None:
    """Wait until the pods, which belong to the RayCluster, have ended; then remove the rest."""
    kubectl = _kubectl(config)
    for name in reversed(FILES):
        waiting = ["--ignore-not-found", "--cascade=foreground", "--timeout=300s"]
        run_command([*kubectl, "delete", f"--filename={folder / name}", *waiting])
    run_command([*kubectl, "delete", "secret", secret_name(config), "--ignore-not-found"])


def remaining(config: PoolConfig, folder: Path) -> list[str]:
    """Pods and Ray clusters that are still there."""
    kubectl, name = _kubectl(config), config.cluster_name
    pods = tool_output([*kubectl, "get", "pods", f"--selector=ray.io/cluster={name}", "--output=name"])
    cluster = tool_output([*kubectl, "get", "rayclusters.ray.io", name, "--ignore-not-found", "--output=name"])
    return [*cluster.split(), *pods.split()]


def _kubectl(config: PoolConfig) -> list[str]:
    tool = require_tool("kubectl", "install it, and point it to your Kubernetes")
    return [tool, f"--namespace={config.kubernetes.namespace}"]
