"""What lies around a pool's machines: the network and who may reach it, Kubernetes."""

import ipaddress
from typing import Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from artifacts import STRICT


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
