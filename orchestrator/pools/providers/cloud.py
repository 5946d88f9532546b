"""Start and end pools on AWS and Google Cloud with Ray's cluster launcher, `ray up` and `ray down`."""

from pathlib import Path

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.providers import aws_account, gcp_account
from orchestrator.pools.providers.aws import GROUP_FILE
from orchestrator.pools.shell import require_tool, run_command

FILE = "pool.yaml"


def check_aws(config: PoolConfig, folder: Path) -> None:
    """Check the launcher, boto3 with credentials, and the `aws` tool if it has to create a security group."""
    _require_ray()
    aws_account.check_account(config.region)
    if not config.network.security_group:
        require_tool("aws", "install AWS's command line, or name a security group in network.security_group")
    _check_proxy(config)


def check_gcp(config: PoolConfig, folder: Path) -> None:
    """Check the launcher, and Google's library with credentials."""
    _require_ray()
    gcp_account.check_account(config.project)
    _check_proxy(config)


def up_aws(config: PoolConfig, folder: Path) -> None:
    """Create the security group, then start: the launcher's own group would be open to the internet."""
    if not config.network.security_group:
        options = ["--stack-name", config.cluster_name, "--template-file", str(folder / GROUP_FILE)]
        run_command([*_build_stack_command(config, "deploy"), *options, "--no-fail-on-empty-changeset"])
    up(config, folder)


def down_aws(config: PoolConfig, folder: Path) -> None:
    """End the nodes, then delete their security group."""
    down(config, folder)
    if not config.network.security_group and not remaining_aws(config, folder):
        run_command([*_build_stack_command(config, "delete-stack"), "--stack-name", config.cluster_name])
        run_command(
            [*_build_stack_command(config, "wait"), "stack-delete-complete", "--stack-name", config.cluster_name]
        )


def up(config: PoolConfig, folder: Path) -> None:
    """Run `ray up`, which starts or updates the head; nodes start when jobs wait."""
    run_command([_require_ray(), "up", "--yes", "--no-config-cache", str(folder / FILE)])


def down(config: PoolConfig, folder: Path) -> None:
    """Run `ray down`, which ends the nodes and the head."""
    run_command([_require_ray(), "down", "--yes", str(folder / FILE)])


def remaining_aws(config: PoolConfig, folder: Path) -> list[str]:
    """Return the instances that AWS still has and charges for."""
    return aws_account.list_machines(config.region, config.cluster_name)


def remaining_gcp(config: PoolConfig, folder: Path) -> list[str]:
    """Return the instances that Google still has and charges for."""
    return gcp_account.list_machines(config.project, config.cluster_name)


def _check_proxy(config: PoolConfig) -> None:
    if config.network.ssh_proxy_command:
        require_tool(config.network.ssh_proxy_command.split()[0], "network.ssh_proxy_command needs it")


def _require_ray() -> str:
    return require_tool("ray", "install decentralized-diffusion again")


def _build_stack_command(config: PoolConfig, verb: str) -> list[str]:
    return [require_tool("aws", "install AWS's command line"), "--region", config.region, "cloudformation", verb]
