"""An ensemble as one model: a diffusers pipeline that also opens run folders."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch

from ensemble.config import SamplingConfig
from ensemble.pipeline import INDEX, PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.schedulers import SOLVER_SCHEDULERS
from orchestrator.cli.sample import find_pipeline, resolve_selection
from orchestrator.config.schema import RunConfig
from orchestrator.run.run_folder import RunFolder


class DDMPipeline(EnsembleDiffusionPipeline):
    """An ensemble of experts that samples like one model: a `diffusers.DiffusionPipeline`.

    Image i depends on its seed or generator alone, whatever the batch.
    """

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        scheduler: Any = None,
    ) -> Self:
        """Load a pipeline folder, or the ensemble of a finished run folder with the run's sampling settings.

        `dtype` is that of the networks (default: as saved), `device_map` the device of all of them. Files of a run are
        compared with their checksums first. Raises `PipelineError`, `ArtifactError` or `RunFolderError` for a folder
        that cannot be loaded; nothing in the folder is executed.
        """
        path = Path(folder).expanduser()
        if (path / INDEX).is_file():
            pipeline = super().from_pretrained(path, dtype=dtype, device_map=device_map, scheduler=scheduler)
            return cast("Self", pipeline)
        if not (path / "config.yaml").is_file():
            raise PipelineError(f"{path} is neither a pipeline folder (no {INDEX}) nor a run folder (no config.yaml)")
        run = RunFolder(path)
        return cls.from_run(run, find_pipeline(run, monolith=False), dtype, device_map, scheduler)

    @classmethod
    def from_run(
        cls,
        run: RunFolder,
        folder: Path,
        dtype: torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        scheduler: Any = None,
    ) -> Self:
        """Load one of a run's pipeline folders with the run's sampling settings."""
        sampling = sampling_of_run(run, run.load_config())
        scheduler = scheduler or SOLVER_SCHEDULERS[sampling.solver]()
        pipeline = super().from_pretrained(folder, dtype=dtype, device_map=device_map, scheduler=scheduler)
        pipeline.sampling = sampling
        return cast("Self", pipeline)


def sampling_of_run(run: RunFolder, config: RunConfig) -> SamplingConfig:
    """Return a run's sampling settings; `auto` is replaced by the selection that the run found."""
    return replace(config.ensemble, selection=resolve_selection(run, config.ensemble.selection))
