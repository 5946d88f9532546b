"""What is installed on a node, and how Ray is started there; the same for every cloud."""

import shlex
import sys
from importlib.metadata import version

RAY_VERSION = version("ray")
"""Ray on the nodes is the Ray here,"""
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
"""and so is Python."""

TOKEN_ON_NODE = "$HOME/.ray/auth_token"
"""Where a node finds the token: the file that Ray reads by itself."""

PACKAGES = (
    "diffusers>=0.36",
    "faiss-cpu>=1.9",
    "fsspec>=2024.6",
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
    "aiohttp>=3.9",
)
"""What our code needs on a node beside Ray: the project's own requirements and its extra `cloud`."""


def install(packages: tuple[str, ...]) -> str:
    """The command that installs `packages` beside our version of Ray."""
    return shlex.join(["pip", "install", "--quiet", f"ray[default]=={RAY_VERSION}", *packages])


def guard_token() -> str:
    """The command that makes the token readable by its owner alone, whoever copied it there."""
    return f"sudo chown $(id -u):$(id -g) {TOKEN_ON_NODE} && chmod 600 {TOKEN_ON_NODE}"


def environment(start_timeout_s: float) -> str:
    """The command that a shell needs before `ray`: token authentication on; jobs inherit it."""
    variables = (
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={TOKEN_ON_NODE}",
        f"RAY_JOB_START_TIMEOUT_SECONDS={start_timeout_s:.0f}",
        "RAY_USAGE_STATS_ENABLED=0",
    )
    return " ".join(["export", *variables])


def start_ray(*options: str) -> str:
    """The command that starts Ray on a node, after `environment`."""
    return " ".join(["ulimit -n 65536; ray start", *options])
