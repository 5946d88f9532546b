"""Kubernetes: a RayCluster for KubeRay, its NetworkPolicy, and a RayJob that starts its own Ray cluster.

KubeRay passes the token to its containers from a Secret, which `ddm pool up` creates from the token's file.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from orchestrator.pools.config import HeadConfig, NodeConfig, PoolConfig, hyphenate
from orchestrator.pools.providers.node_setup import RAY_VERSION
from orchestrator.pools.providers.ray_launcher import get_resource_name
from orchestrator.pools.shell import PoolError, require_tool, run_command, tool_output
from orchestrator.pools.yaml_text import to_yaml

LABEL = "ddm-pool"
RUNS = "/runs"
GROUP = "ray.io/v1"


def render_kuberay(config: PoolConfig) -> dict[str, str]:
    """Return `network_policy.yaml`, `ray_cluster.yaml`, and `ray_job.yaml` if `kubernetes.run` is set."""
    cluster = {
        "apiVersion": GROUP,
        "kind": "RayCluster",
        "metadata": _build_metadata(config),
        "spec": _build_cluster(config),
    }
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _build_metadata(config),
        "spec": _build_policy(config),
    }
    files = {
        "network_policy.yaml": to_yaml(
            policy, comment=f"Network access to pool {config.name}: its own pods and KubeRay."
        ),
        "ray_cluster.yaml": to_yaml(cluster, comment=f"Pool {config.name} for KubeRay 1.6 or later."),
    }
    if config.kubernetes.run:
        job = {"apiVersion": GROUP, "kind": "RayJob", "metadata": _build_metadata(config), "spec": _build_job(config)}
        comment = f"A run on a Ray cluster of its own, like pool {config.name}: `kubectl create -f ray_job.yaml`."
        files["ray_job.yaml"] = to_yaml(job, comment=comment)
    return files


def get_secret_name(config: PoolConfig) -> str:
    """Return the name of the Secret with the token, under the key `auth_token`."""
    return f"{config.cluster_name}-token"


def _build_metadata(config: PoolConfig) -> dict[str, Any]:
    return {"name": config.cluster_name, "namespace": config.kubernetes.namespace, "labels": _build_labels(config)}


def _build_labels(config: PoolConfig) -> dict[str, str]:
    return {**config.tags, LABEL: config.name}


def _build_cluster(config: PoolConfig) -> dict[str, Any]:
    head = {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _build_pod(config, "ray-head", config.head, gpus=0),
    }
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": get_secret_name(config)},
        **({"tlsOptions": {"enabled": True}} if config.kubernetes.mutual_tls else {}),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": round(config.idle_minutes * 60), "upscalingMode": "Default"},
        "headGroupSpec": head,
        "workerGroupSpecs": [_build_group(config, name, node) for name, node in config.nodes.items()],
    }


def _build_group(config: PoolConfig, name: str, node: NodeConfig) -> dict[str, Any]:
    resources = json.dumps(json.dumps({get_resource_name(name): node.slots}))  # KubeRay inserts it into a shell command
    return {
        "groupName": hyphenate(name),
        "replicas": node.min_nodes,
        "minReplicas": node.min_nodes,
        "maxReplicas": node.max_nodes,
        "rayStartParams": {"resources": resources},
        "template": _build_pod(config, "ray-worker", node, gpus=node.gpus),
    }


def _build_pod(config: PoolConfig, container: str, machine: HeadConfig, *, gpus: int) -> dict[str, Any]:
    """Return a pod template; the container cannot become root, and its limits equal its requests."""
    amounts = {
        "cpu": str(machine.cpus),
        "memory": f"{machine.memory_gb:g}Gi",
        "ephemeral-storage": f"{machine.disk_gb}Gi",
    }
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    main_container: dict[str, Any] = {
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
    pod: dict[str, Any] = {"containers": [main_container]}
    if config.kubernetes.claim:
        main_container["volumeMounts"] = [{"name": "runs", "mountPath": RUNS}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": config.kubernetes.claim}}]
    if machine.selector:
        pod["nodeSelector"] = dict(machine.selector)
    if gpus:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in config.kubernetes.tolerations]
    return {"metadata": {"labels": _build_labels(config)}, "spec": pod}


def _build_job(config: PoolConfig) -> dict[str, Any]:
    """Return a RayJob that KubeRay submits over HTTP; its Ray cluster is deleted when the run ends."""
    overrides = ("compute=ray_local", "compute.address=auto", f"folder={RUNS}/{config.name}")
    return {
        "entrypoint": shlex.join(["ddm", "run", *overrides, *config.kubernetes.run]),
        "submissionMode": "HTTPMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 60,
        "backoffLimit": 0,
        "rayClusterSpec": _build_cluster(config),
    }


def _build_policy(config: PoolConfig) -> dict[str, Any]:
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
    """Check `kubectl`, the connection, KubeRay, and the right to create Ray clusters."""
    kinds = tool_output([*_build_kubectl_command(config), "api-resources", "--api-group=ray.io", "--output=name"])
    if "rayclusters.ray.io" not in kinds.split():
        raise PoolError("this Kubernetes has no RayCluster resource; install KubeRay 1.6 or later with Helm")
    if config.kubernetes.mutual_tls:  # an operator without the field would drop it, and start the pool unencrypted
        command = [*_build_kubectl_command(config), "explain", "raycluster.spec.tlsOptions", "--api-version=ray.io/v1"]
        tool_output(command, remedy="install KubeRay 1.7 with RayClusterMTLS and cert-manager, or set mutual_tls=false")
    command = [*_build_kubectl_command(config), "auth", "can-i", "create", "rayclusters.ray.io"]
    tool_output(command, remedy=f"request this right in namespace {config.kubernetes.namespace}")


def up(config: PoolConfig, folder: Path) -> None:
    """Create the Secret from the token's file, so no command and no YAML contains the token; then apply the files."""
    kubectl, secret = _build_kubectl_command(config), get_secret_name(config)
    run_command([*kubectl, "delete", "secret", secret, "--ignore-not-found"])
    run_command([*kubectl, "create", "secret", "generic", secret, f"--from-file=auth_token={config.token_path}"])
    for name in FILES:
        run_command([*kubectl, "apply", f"--filename={folder / name}"])


def down(config: PoolConfig, folder: Path) -> None:
    """Delete the RayCluster and wait until its pods have ended; then delete the policy and the Secret."""
    kubectl = _build_kubectl_command(config)
    for name in reversed(FILES):
        options = ["--ignore-not-found", "--cascade=foreground", "--timeout=300s"]
        run_command([*kubectl, "delete", f"--filename={folder / name}", *options])
    run_command([*kubectl, "delete", "secret", get_secret_name(config), "--ignore-not-found"])


def remaining(config: PoolConfig, folder: Path) -> list[str]:
    """Return the remaining Ray clusters and pods."""
    kubectl, name = _build_kubectl_command(config), config.cluster_name
    pods = tool_output([*kubectl, "get", "pods", f"--selector=ray.io/cluster={name}", "--output=name"])
    cluster = tool_output([*kubectl, "get", "rayclusters.ray.io", name, "--ignore-not-found", "--output=name"])
    return [*cluster.split(), *pods.split()]


def _build_kubectl_command(config: PoolConfig) -> list[str]:
    tool = require_tool("kubectl", "install it, and point it to your Kubernetes")
    return [tool, f"--namespace={config.kubernetes.namespace}"]
