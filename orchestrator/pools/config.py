"""Configuration of a pool: its machines, its network, and its price limit."""

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
    """A machine. The head runs Ray and no stage; it is always on demand, because the pool ends with it."""

    machine: str = ""
    """Machine type, such as g6.xlarge; unused by kuberay and local."""
    cpus: Annotated[int, Field(ge=1)] = 2
    """Number of CPUs."""
    memory_gb: Annotated[float, Field(gt=0)] = 8.0
    """Memory in GB."""
    disk_gb: Annotated[int, Field(ge=10)] = 100
    """Disk size in GB."""
    price_per_hour: Money = 0.0
    """Price of one machine, in the currency of your bill."""
    selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes that may run it; kuberay only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NodeConfig(HeadConfig):
    """One type of node: one kind of GPU, spot or on demand."""

    gpu: str = ""
    """Kind of GPU as SkyPilot and Ray write it, such as L4 or A100-80GB; empty for a node without GPUs."""
    gpus: Count = 0
    """Number of GPUs of one node."""
    accelerator: str = ""
    """Google's name of a GPU that the machine type does not include, such as nvidia-tesla-t4; gcp only."""
    spot: bool = False
    """Whether it is a spot node: cheaper and preemptible."""
    fallback: str | None = None
    """On-demand type that replaces this one when it is not available; Ray itself never switches types."""
    min_nodes: Count = 0
    """Nodes that remain while nothing runs."""
    max_nodes: Count = 1
    """Maximum number of nodes; 0 disables the type."""
    preemptions_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Expected preemptions of one node per hour, for `ddm plan`."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        """Check combinations of fields."""
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes={self.min_nodes} is more than max_nodes={self.max_nodes}; lower min_nodes")
        if bool(self.gpu) != bool(self.gpus):
            raise ValueError(f"gpu={self.gpu!r} and gpus={self.gpus}: a node with GPUs needs both; set the other one")
        if self.fallback and not self.spot:
            raise ValueError(f"fallback={self.fallback} needs spot=true: on-demand nodes are not preempted")
        return self

    @property
    def slots(self) -> int:
        """Return the amount of the type's Ray resource on one node: its GPUs, or its CPUs if it has none."""
        return self.gpus or self.cpus


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkConfig:
    """Network access to the machines; they have no public address and no open port but ssh (aws and gcp)."""

    subnets: tuple[str, ...] = ()
    """Private subnets, one for each zone that may be used: AWS ids, or one Google path regions/R/subnetworks/S."""
    vpc: str = ""
    """AWS VPC of those subnets, in which a security group is created unless `security_group` names one."""
    security_group: str = ""
    """AWS security group to use; empty creates one that admits its own members, and ssh from `ssh_source`."""
    ssh_source: str = ""
    """Addresses that may use ssh, such as 10.0.0.0/16; empty for none from outside, so use a proxy."""
    ssh_user: str = "ubuntu"
    """Account on the machines."""
    ssh_proxy_command: str = ""
    """ssh's ProxyCommand, such as AWS Session Manager or Google's IAP tunnel; %h is the machine's id."""

    @model_validator(mode="after")
    def _check_ssh_source(self) -> Self:
        """Check that ssh is not open to the whole internet."""
        if self.ssh_source:
            network = ipaddress.ip_network(self.ssh_source, strict=False)
            if network.prefixlen < (8 if network.version == 4 else 32):
                raise ValueError(
                    f"ssh_source={self.ssh_source} is too large a part of the internet; name your own network"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KubernetesConfig:
    """Place of the pool in Kubernetes (kuberay)."""

    namespace: str = "default"
    """Namespace of the pool."""
    operator_namespace: str = "kuberay-system"
    """Namespace of the KubeRay operator, the only other pod that may reach the head."""
    tolerations: tuple[str, ...] = ("nvidia.com/gpu",)
    """Taints that the pods tolerate, by key."""
    run: tuple[str, ...] = ()
    """Overrides of a run for a RayJob, which starts and ends its own Ray cluster; empty renders no RayJob."""
    claim: str = ""
    """Persistent volume claim (ReadWriteMany) for that run's folder."""
    mutual_tls: bool = False
    """Whether the pods prove who they are to each other and encrypt; needs KubeRay 1.7 with its feature gate
    RayClusterMTLS, and cert-manager, which makes the certificates."""

    @model_validator(mode="after")
    def _check_claim(self) -> Self:
        """Check that a run's folder outlives its pods."""
        if self.run and not self.claim:
            raise ValueError("run needs claim: the run's folder would be deleted with the pods")
        return self


ProviderName = Literal["aws", "gcp", "kuberay", "skypilot", "local"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PoolConfig:
    """A pool of nodes that grows while stages wait and shrinks when they do not."""

    name: Name
    """Name of the pool; nodes have it as a tag, with the prefix `ddm-`."""
    provider: ProviderName
    """Tool that starts the nodes: Ray's cluster launcher (aws, gcp), KubeRay, SkyPilot, or local processes."""
    region: str = ""
    """Region of the cloud; for skypilot its `infra`, such as aws/us-east-1, empty for the cheapest."""
    zones: tuple[str, ...] = ()
    """Zones that may be used; one for gcp, whose machines are all in one zone."""
    project: str = ""
    """Google Cloud project id; gcp only."""
    head: HeadConfig = HeadConfig()
    """The machine that runs Ray's head."""
    nodes: dict[Name, NodeConfig] = Field(min_length=1)
    """Types of nodes by name; each is an island with a Ray resource `pool_` + name."""
    idle_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A node that is idle for so long is released."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Longest wait of a job for its node before Ray fails it; Ray's default of 900 s is short for spot."""
    network: NetworkConfig = NetworkConfig()
    """Network access."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Place in Kubernetes."""
    machine_image: str = ""
    """Disk image with Docker and a GPU driver: an AMI, or Google's projects/P/global/images/family/F."""
    container: str = ""
    """Container image; empty uses Ray's own with the local versions of Ray and Python."""
    identity: str = ""
    """AWS instance profile ARN or Google service account of the nodes; empty uses Ray's default."""
    packages: tuple[str, ...] = PACKAGES
    """Python packages to install on every node besides Ray; empty if the container has them."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of all resources that cost money."""
    token_file: str = ""
    """File with the pool's token, created if absent; empty is `token` in the pool's folder below ~/.ddm/pools."""
    storage: StorageUrl | None = None
    """URL of the islands' storage; empty is a folder next to the token, which only local can reach."""
    first_port: Annotated[int, Field(ge=1024, le=65435)] = 18_900
    """First of a hundred ports on loopback for the pool; local only."""
    tunnel_port: Annotated[int, Field(ge=1024, le=65535)] = 8265
    """Port on loopback of your tunnel to the Jobs API; all but local."""
    max_price_per_hour: Money | None = None
    """Highest price of all nodes together; a more expensive pool is refused."""

    @model_validator(mode="after")
    def _check_required_keys(self) -> Self:
        """Check the keys that only some providers need."""
        for key in _REQUIRED_KEYS[self.provider]:
            if not _get_nested(self, key):
                raise ValueError(f"provider={self.provider} needs {key}")
        if self.provider == "aws" and not (self.network.vpc or self.network.security_group):
            raise ValueError("provider=aws needs network.vpc, or an existing network.security_group")
        for name, node in self.nodes.items():
            if not node.machine and (self.provider in ("aws", "gcp") or (self.provider == "skypilot" and not node.gpu)):
                raise ValueError(f"provider={self.provider} needs nodes.{name}.machine")
        return self

    @model_validator(mode="after")
    def _check_fallbacks(self) -> Self:
        """Check that the fallback of a spot type exists, is on demand and has the same GPUs."""
        for name, node in self.nodes.items():
            if node.fallback is None:
                continue
            fallback = self.nodes.get(node.fallback)
            if fallback is None or fallback.spot or (fallback.gpu, fallback.gpus) != (node.gpu, node.gpus):
                kind = f"{node.gpus} {node.gpu}" if node.gpus else "no GPU"
                raise ValueError(f"nodes.{name}.fallback={node.fallback} must be an on-demand type with {kind}")
        return self

    @model_validator(mode="after")
    def _check_price(self) -> Self:
        """Check the price limit."""
        if self.max_price_per_hour is not None and self.max_cost_per_hour > self.max_price_per_hour:
            raise ValueError(
                f"all nodes together cost {self.max_cost_per_hour:g} an hour and max_price_per_hour="
                f"{self.max_price_per_hour:g}: lower max_nodes, or raise the limit"
            )
        return self

    @property
    def max_cost_per_hour(self) -> float:
        """Return the pool's price per hour while every node is up."""
        return self.head.price_per_hour + sum(node.max_nodes * node.price_per_hour for node in self.nodes.values())

    @property
    def cluster_name(self) -> str:
        """Return the pool's name for Ray, Kubernetes and SkyPilot: lower case with hyphens."""
        return hyphenate(f"ddm_{self.name}")

    @property
    def token_path(self) -> Path:
        """Return the path of its token on this machine."""
        return Path(self.token_file or f"~/.ddm/pools/{self.name}/token").expanduser().absolute()

    @property
    def storage_url(self) -> str:
        """Return the URL of the islands' storage."""
        return self.storage or str(self.token_path.with_name("storage"))

    @property
    def address(self) -> str:
        """Return the URL at which this machine reaches the Jobs API."""
        port = self.first_port + PORTS["--dashboard-port"] if self.provider == "local" else self.tunnel_port
        return f"http://{ADDRESS}:{port}"

    @property
    def image(self) -> str:
        """Return the configured container image, or Ray's own."""
        has_gpu = any(node.gpus for node in self.nodes.values())
        default = f"rayproject/ray:{RAY_VERSION}-py{PYTHON_VERSION.replace('.', '')}"
        return self.container or default + ("-gpu" if has_gpu else "")


_REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "aws": ("region", "network.subnets", "head.machine", "storage"),
    "gcp": ("region", "zones", "project", "network.subnets", "head.machine", "machine_image", "storage"),
    "kuberay": ("storage",),
    "skypilot": ("storage",),
    "local": (),
}


def hyphenate(name: str) -> str:
    """Return a name as Kubernetes and the clouds accept it."""
    return name.replace("_", "-")


def _get_nested(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config
