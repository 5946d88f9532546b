"""Kubernetes: pods and policy against Kubernetes' schema, Ray clusters against Ray's parser and KubeRay's fields.

No package ships KubeRay's schema, so its fields are listed here from its documentation.
"""

import json
import shlex

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator
from kubernetes_validate import validate
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from orchestrator.pools.render import render
from tests.orchestrator.pools.pools import load_shipped, nodes, render_document

KUBERNETES = "1.34"
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
DNS = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 50}


def fields(required=(), **known):
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


CLUSTER = fields(
    ["headGroupSpec", "rayVersion", "authOptions"],
    rayVersion={"type": "string"},
    authOptions=fields(["mode", "secretName"], mode={"const": "token"}, secretName=DNS),
    tlsOptions=fields(["enabled"], enabled={"const": True}),
    enableInTreeAutoscaling={"const": True},
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=fields(
        ["template"], serviceType={"const": "ClusterIP"}, rayStartParams=TEXTS, template={"type": "object"}
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName=DNS,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template={"type": "object"},
        ),
    },
)
JOB = fields(
    ["rayClusterSpec", "entrypoint"],
    entrypoint={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER,
)


def manifest(kind, spec):
    metadata = fields(["name"], name=DNS, namespace=DNS, labels=TEXTS)
    return fields(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


def templates(cluster):
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def test_ray_cluster_has_only_kuberay_fields():
    Draft202012Validator(manifest("RayCluster", CLUSTER)).validate(
        render_document(load_shipped("kuberay"), "ray_cluster.yaml")
    )


def test_ray_job_has_only_kuberay_fields():
    Draft202012Validator(manifest("RayJob", JOB)).validate(render_document(load_shipped("kuberay"), "ray_job.yaml"))


def test_pods_and_policy_match_the_kubernetes_schema():
    validate(render_document(load_shipped("kuberay"), "network_policy.yaml"), KUBERNETES, strict=True)
    for file in ("ray_cluster.yaml", "ray_job.yaml"):
        spec = render_document(load_shipped("kuberay"), file)["spec"]
        for template in templates(spec.get("rayClusterSpec", spec)):
            validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True)


@settings(deadline=None, max_examples=25)
@given(nodes())
def test_ray_autoscaler_reads_the_resources_of_any_node(node):
    config = load_shipped("kuberay", f"nodes.one_type={json.dumps(node)}")
    parsed = _derive_autoscaling_config_from_ray_cr(render_document(config, "ray_cluster.yaml"))
    node_type = parsed["available_node_types"]["one-type"]
    assert (node_type["min_workers"], node_type["max_workers"]) == (node["min_nodes"], node["max_nodes"])
    assert node_type["resources"]["pool_one_type"] == (node["gpus"] or node["cpus"])
    assert (node_type["resources"]["CPU"], node_type["resources"].get("GPU", 0)) == (node["cpus"], node["gpus"])
    assert parsed["available_node_types"]["headgroup"]["resources"]["CPU"] == 0


def test_no_rendered_file_contains_the_token(tmp_path):
    (tmp_path / "token").write_text("a-secret-of-its-own")
    files = render(load_shipped("kuberay", f"token_file={tmp_path}/token"))
    assert not [file for file, text in files.items() if "a-secret-of-its-own" in text or "kind: Secret" in text]


def test_network_policy_admits_only_pods_and_operator():
    spec = render_document(load_shipped("kuberay", "kubernetes.operator_namespace=op"), "network_policy.yaml")["spec"]
    pods, operator = spec["ingress"]
    assert spec["podSelector"] == pods["from"][0]["podSelector"] == {"matchLabels": {"ddm-pool": "kuberay"}}
    assert operator["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "op"}}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    cluster = render_document(load_shipped("kuberay"), "ray_cluster.yaml")["spec"]
    assert all(template["metadata"]["labels"]["ddm-pool"] == "kuberay" for template in templates(cluster))


def test_mutual_tls_is_requested_where_it_is_configured():
    config = load_shipped("kuberay", "kubernetes.mutual_tls=true")
    for file, kind, spec in (("ray_cluster.yaml", "RayCluster", CLUSTER), ("ray_job.yaml", "RayJob", JOB)):
        document = render_document(config, file)
        Draft202012Validator(manifest(kind, spec)).validate(document)
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        names = {entry["name"] for pod in templates(cluster) for entry in pod["spec"]["containers"][0]["env"]}
        assert cluster["tlsOptions"] == {"enabled": True} and not [name for name in names if "TLS" in name]
    assert "tlsOptions" not in render_document(load_shipped("kuberay"), "ray_cluster.yaml")["spec"]


def test_container_is_our_image_and_cannot_become_root():
    for template in templates(render_document(load_shipped("kuberay"), "ray_cluster.yaml")["spec"]):
        (container,) = template["spec"]["containers"]
        assert container["image"].partition(":")[0].endswith("/ddm")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_run_overrides_are_quoted_and_its_folder_is_persistent():
    config = load_shipped("kuberay", 'kubernetes.run=["name=a b; rm -rf /"]')
    job = render_document(config, "ray_job.yaml")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["ddm", "run"] and words[-1] == "name=a b; rm -rf /"
    assert "folder=/runs/kuberay" in words
    for template in templates(job["rayClusterSpec"]):
        assert template["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "ddm-runs"}


def test_render_without_run_has_no_ray_job():
    assert "ray_job.yaml" not in render(load_shipped("kuberay", "kubernetes.run=[]", "kubernetes.claim="))


@pytest.mark.parametrize("name", ["l4_spot", "l4"])
def test_gpu_node_requests_and_selects_its_gpu(name):
    groups = render_document(load_shipped("kuberay"), "ray_cluster.yaml")["spec"]["workerGroupSpecs"]
    (pod,) = [group["template"]["spec"] for group in groups if group["groupName"] == name.replace("_", "-")]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-l4"
    assert {toleration["key"] for toleration in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
