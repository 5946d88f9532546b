"""AWS and Google Cloud through Ray's cluster launcher, `ray up` and `ray down`."""

from pathlib import Path

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.providers import aws_account, gcp_account
from orchestrator.pools.providers.aws import GROUP_FILE
from orchestrator.pools.shell import require_tool, run_command

FILE = "pool.yaml"


def check_aws(config: PoolConfig, folder: Path) -> None:
    """The launcher, boto3 with credentials, and the `aws` tool for whatever is to be made beside the nodes."""
    _ray()
    aws_account.check_account(config.region)
    if not config.network.security_group:
        require_tool("aws", "install AWS's command line, or name a security group in network.security_group")
    _check_proxy(config)


def check_gcp(config: PoolConfig, folder: Path) -> None:
    """The launcher, and Google's library with credentials."""
    _ray()
    gcp_account.check_account(config.project)
    _check_proxy(config)


def up_aws(config: PoolConfig, folder: Path) -> None:
    """The security group first: the launcher would make one that is open to the world."""
    if not config.network.security_group:
        named = ["--stack-name", config.cluster_name, "--template-file", str(folder / GROUP_FILE)]
        run_command([*_stack(config, "deploy"), *named, "--no-fail-on-empty-changeset"])
    up(config, folder)


def down_aws(config: PoolConfig, folder: Path) -> None:
    """The nodes first, then their security group."""
    down(config, folder)
    if not config.network.security_group and not remaining_aws(config, folder):
        run_command([*_stack(config, "delete-stack"), "--stack-name", config.cluster_name])
        run_command([*_stack(config, "wait"), "stack-delete-complete", "--stack-name", config.cluster_name])


def up(config: PoolConfig, folder: Path) -> None:
    """`ray up` starts the head, or changes one that is up; nodes come with the work."""
    run_command([_ray(), "up", "--yes", "--no-config-cache", str(folder / FILE)])


def down(config: PoolConfig, folder: Path) -> None:
    """`ray down` ends the nodes and the head."""
    run_command([_ray(), "down", "--yes", str(folder / FILE)])


def remaining_aws(config: PoolConfig, folder: Path) -> list[str]:
    """Instances that AWS still has, and is paid for."""
    return aws_account.machines(config.region, config.cluster_name)


def remaining_gcp(config: PoolConfig, folder: Path) -> list[str]:
    """Instances that Google still has, and is paid for."""
    return gcp_account.machines(config.project, config.cluster_name)


def _check_proxy(config: PoolConfig) -> None:
    if config.network.ssh_proxy_command:
        require_tool(config.network.ssh_proxy_command.split()[0], "network.ssh_proxy_command needs it")


def _ray() -> str:
    return require_tool("ray", "install decentralized-diffusion again")


def _stack(config: PoolConfig, verb: str) -> list[str]:
    return [require_tool("aws", "install AWS's command line"), "--region", config.region, "cloudformation", verb]
