"""What a pool is: its machines, who may reach it, and what it may cost."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from orchestrator.config.compute import Money, StorageUrl
from orchestrator.islands.local.ray_head import ADDRESS, PORTS
from orchestrator.pools.providers.node_setup import PACKAGES, PYTHON_VERSION, RAY_VERSION

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeadConfig:
    """A machine. The head runs Ray and no stage; it is always on demand, since the pool ends with it."""

    machine: str = ""
    """The cloud's name of the machine type, such as g6.xlarge; unused by kuberay and local."""
    cpus: Annotated[int, Field(ge=1)] = 2
    """Its CPUs."""
    memory_gb: Annotated[float, Field(gt=0)] = 8.0
    """Its memory."""
    disk_gb: Annotated[int, Field(ge=10)] = 100
    """Its disk."""
    price_per_hour: Money = 0.0
    """What one costs, in the currency of your bill."""
    selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes that may carry it; kuberay only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NodeConfig(HeadConfig):
    """One type of node: one kind of GPU, spot or on demand."""

    gpu: str = ""
    """Kind of GPU as SkyPilot and Ray write it, such as L4 or A100-80GB; empty is a node without."""
    gpus: Count = 0
    """GPUs of one node."""
    accelerator: str = ""
    """Google's name of a GPU that is no part of the machine type, such as nvidia-tesla-t4; gcp only."""
    spot: bool = False
    """Whether it is cheap and may be taken away."""
    fallback: str | None = None
    """The on-demand type that stands in when this one cannot be had: Ray itself never changes over."""
    min_nodes: Count = 0
    """Nodes that stay while nothing runs."""
    max_nodes: Count = 1
    """Nodes at most; 0 withdraws the type."""
    preemptions_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """How often one is lost, for `ddm plan`."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Check what no single field can."""
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes={self.min_nodes} is more than max_nodes={self.max_nodes}")
        if bool(self.gpu) != bool(self.gpus):
            raise ValueError(f"gpu={self.gpu!r} and gpus={self.gpus}: a node with GPUs says which kind and how many")
        if self.fallback and not self.spot:
            raise ValueError(f"fallback={self.fallback} needs spot=true: on-demand nodes are not taken away")
        return self

    @property
    def slots(self) -> int:
        """How much it has of its own resource: one for each GPU, or for each CPU when it has none."""
        return self.gpus or self.cpus


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkConfig:
    """Who may reach the machines; they have no public address and no open port but ssh (aws and gcp)."""

    subnets: tuple[str, ...] = ()
    """Private subnets, one for each zone that may be used: AWS ids, or one Google path regions/R/subnetworks/S."""
    vpc: str = ""
    """AWS VPC of those subnets, in which a security group is made; unused when one is named."""
    security_group: str = ""
    """AWS security group to use; empty makes one that lets in its own members, and ssh from `ssh_source`."""
    ssh_source: str = ""
    """Addresses that may use ssh, such as 10.0.0.0/16; empty: nobody from outside, so go through a proxy."""
    ssh_user: str = "ubuntu"
    """Account on the machines."""
    ssh_proxy_command: str = ""
    """ssh's ProxyCommand, such as AWS Session Manager or Google's IAP tunnel; %h is the machine's id."""

    @model_validator(mode="after")
    def _is_private(self) -> Self:
        """Check that ssh is not open to the world."""
        if self.ssh_source:
            network = ipaddress.ip_network(self.ssh_source, strict=False)
            if network.prefixlen < (8 if network.version == 4 else 32):
                raise ValueError(f"ssh_source={self.ssh_source} is half the world; name your own network")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KubernetesConfig:
    """Where in Kubernetes the pool lies (kuberay)."""

    namespace: str = "default"
    """Namespace of the pool."""
    operator_namespace: str = "kuberay-system"
    """Namespace of the KubeRay operator, the only stranger that may reach the head."""
    tolerations: tuple[str, ...] = ("nvidia.com/gpu",)
    """Taints that the pods put up with, by key."""
    run: tuple[str, ...] = ()
    """Overrides of a run for a RayJob, which brings its own Ray cluster and takes it away; empty renders none."""
    claim: str = ""
    """Persistent volume claim (ReadWriteMany) for that run's folder."""

    @model_validator(mode="after")
    def _is_kept(self) -> Self:
        """Check that a run's folder outlives its pods."""
        if self.run and not self.claim:
            raise ValueError("run needs claim: the run's folder would vanish with the pods")
        return self


ProviderName = Literal["aws", "gcp", "kuberay", "skypilot", "local"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PoolConfig:
    """A pool of nodes that grows while stages wait and shrinks when they do not."""

    name: Name
    """Its name; nodes carry it as a tag, with `ddm-` before it."""
    provider: ProviderName
    """Who starts the nodes: Ray's cluster launcher (aws, gcp), KubeRay, SkyPilot, or processes here (local)."""
    region: str = ""
    """Region of the cloud; for skypilot its `infra`, such as aws/us-east-1, empty for the cheapest."""
    zones: tuple[str, ...] = ()
    """Zones that may be used; one for gcp, since its machines are made in one."""
    project: str = ""
    """Google Cloud project id; gcp only."""
    head: HeadConfig = HeadConfig()
    """The machine that runs Ray's head."""
    nodes: dict[Name, NodeConfig] = Field(min_length=1)
    """Types of nodes by name; each is an island, and has a Ray resource `pool_` + name."""
    idle_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A node without work for so long is given back."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long a job may wait for its node before Ray fails it; Ray's own limit of 900 s is short for spot."""
    network: NetworkConfig = NetworkConfig()
    """Who may reach it."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Where it lies in Kubernetes."""
    machine_image: str = ""
    """Disk image with Docker and the GPU's driver: an AMI, or Google's projects/P/global/images/family/F."""
    container: str = ""
    """Container image; empty takes Ray's own with our versions of Ray and Python."""
    identity: str = ""
    """AWS instance profile ARN or Google service account that the nodes act as; empty leaves it to Ray."""
    packages: tuple[str, ...] = PACKAGES
    """Python packages on every node beside Ray; empty when the container has them."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of everything that costs money."""
    token_file: str = ""
    """File with the pool's token, made if absent; empty is `token` in the pool's folder below ~/.ddm/pools."""
    storage: StorageUrl | None = None
    """The islands' storage as an fsspec URL; empty is a folder beside the token, which only local can reach."""
    first_port: Annotated[int, Field(ge=1024, le=65435)] = 18_900
    """First of a hundred ports on loopback that the pool uses; local only."""
    tunnel_port: Annotated[int, Field(ge=1024, le=65535)] = 8265
    """Port on loopback at which your tunnel reaches the Jobs API; all but local."""
    max_price_per_hour: Money | None = None
    """The pool is refused when all its nodes together could cost more."""

    @model_validator(mode="after")
    def _has_what_its_provider_needs(self) -> Self:
        """Check the keys that one provider needs and another does not."""
        for key in _NEEDED[self.provider]:
            if not _reached(self, key):
                raise ValueError(f"provider={self.provider} needs {key}")
        if self.provider == "aws" and not (self.network.vpc or self.network.security_group):
            raise ValueError("provider=aws needs network.vpc, or an existing network.security_group")
        for name, node in self.nodes.items():
            if not node.machine and (self.provider in ("aws", "gcp") or (self.provider == "skypilot" and not node.gpu)):
                raise ValueError(f"provider={self.provider} needs nodes.{name}.machine")
        return self

    @model_validator(mode="after")
    def _falls_back_to_the_same(self) -> Self:
        """Check that whatever stands in for a spot type is there, stays there and has the same GPUs."""
        for name, node in self.nodes.items():
            if node.fallback is None:
                continue
            other = self.nodes.get(node.fallback)
            if other is None or other.spot or (other.gpu, other.gpus) != (node.gpu, node.gpus):
                kind = f"{node.gpus} {node.gpu}" if node.gpus else "no GPU"
                raise ValueError(f"nodes.{name}.fallback={node.fallback} must be an on-demand type with {kind}")
        return self

    @model_validator(mode="after")
    def _is_affordable(self) -> Self:
        """Check the limit on what it may cost."""
        if self.max_price_per_hour is not None and self.most_per_hour > self.max_price_per_hour:
            raise ValueError(
                f"all nodes together cost {self.most_per_hour:g} an hour and max_price_per_hour="
                f"{self.max_price_per_hour:g}: lower max_nodes, or raise the limit"
            )
        return self

    @property
    def most_per_hour(self) -> float:
        """What the pool costs while every node is up."""
        return self.head.price_per_hour + sum(node.max_nodes * node.price_per_hour for node in self.nodes.values())

    @property
    def cluster_name(self) -> str:
        """Its name for Ray, Kubernetes and SkyPilot: lower case, hyphens."""
        return dashed(f"ddm_{self.name}")

    @property
    def token(self) -> Path:
        """Where its token lies on this machine."""
        return Path(self.token_file or f"~/.ddm/pools/{self.name}/token").expanduser().absolute()

    @property
    def stored(self) -> str:
        """URL of the islands' storage."""
        return self.storage or str(self.token.with_name("storage"))

    @property
    def address(self) -> str:
        """Where the Jobs API is reached from here."""
        port = self.first_port + PORTS["--dashboard-port"] if self.provider == "local" else self.tunnel_port
        return f"http://{ADDRESS}:{port}"

    @property
    def image(self) -> str:
        """The container image: what the configuration names, or Ray's own."""
        has_gpu = any(node.gpus for node in self.nodes.values())
        own = f"rayproject/ray:{RAY_VERSION}-py{PYTHON_VERSION.replace('.', '')}"
        return self.container or own + ("-gpu" if has_gpu else "")


_NEEDED: dict[str, tuple[str, ...]] = {
    "aws": ("region", "network.subnets", "head.machine", "storage"),
    "gcp": ("region", "zones", "project", "network.subnets", "head.machine", "machine_image", "storage"),
    "kuberay": ("storage",),
    "skypilot": ("storage",),
    "local": (),
}


def dashed(name: str) -> str:
    """A name as Kubernetes and the clouds take it."""
    return name.replace("_", "-")


def _reached(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config
