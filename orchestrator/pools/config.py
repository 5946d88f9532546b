"""What a pool is: its machines, who may reach it, and what it may cost."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from orchestrator.compute_config import Money, StorageUrl
from orchestrator.islands.head import ADDRESS, PORTS
from orchestrator.pools.machines import HeadConfig, NodeConfig
from orchestrator.pools.software import PACKAGES, PYTHON_VERSION, RAY_VERSION
from orchestrator.pools.surroundings import KubernetesConfig, NetworkConfig

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
