"""An ensemble as one model: a diffusers pipeline that also opens run folders."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch

from ddm.model_card import render_model_card
from ensemble.config import SamplingConfig
from ensemble.pipeline_folder import INDEX, PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.modular import EnsembleModularPipeline
from ensemble.pipelines.schedulers import SOLVER_SCHEDULERS
from orchestrator.config.schema import RunConfig
from orchestrator.reporting.results import find_pipeline, resolve_selection
from orchestrator.run.run_folder import RunFolder


class DDMPipeline(EnsembleDiffusionPipeline):
    """An ensemble of experts that samples like one model: a `diffusers.DiffusionPipeline`.

    Image i depends on its seed or generator alone, whatever the batch.
    """

    run: RunFolder | None = None
    """The run that it was loaded from."""

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - the arguments of diffusers' pipelines
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        max_memory: int | str | None = None,
        quantization_config: Any = None,
        scheduler: Any = None,
        text_encoder: Any = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a pipeline folder, a finished run with its sampling settings, or a repository `owner/name` of the Hub.

        `dtype` is that of the networks (default: as saved), `device_map` the device of all of them. `max_memory` is a
        number of bytes, or text such as `"4GB"`: experts that do not fit into it together are loaded when they are
        called. `quantization_config` is a `PipelineQuantizationConfig` of diffusers that names experts. `text_encoder`
        has `encode(captions)`; the default is that of the training. Files of a run are compared with their checksums
        first. Raises `PipelineError`, an `ArtifactError` or `RunFolderError` for what
        cannot be loaded; nothing in a folder is executed.
        """
        folder, sampling, run = find_ensemble(name)
        pipeline = super().from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            quantization_config=quantization_config,
            scheduler=scheduler or (SOLVER_SCHEDULERS[sampling.solver]() if run else None),
            text_encoder=text_encoder,
            revision=revision,
            token=token,
        )
        pipeline.sampling, pipeline.run = sampling, run
        return cast("Self", pipeline)

    @classmethod
    def from_run(cls, run: RunFolder, folder: Path) -> Self:
        """Load one of a run's pipeline folders with the run's sampling settings."""
        sampling = sampling_of_run(run, run.load_config())
        pipeline = super().from_pretrained(folder, scheduler=SOLVER_SCHEDULERS[sampling.solver]())
        pipeline.sampling, pipeline.run = sampling, run
        return cast("Self", pipeline)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        license_name: str = "other",
        commit_message: str = "Upload an ensemble",
        private: bool | None = None,
        token: str | None = None,
        client: Any = None,
    ) -> str:
        """Upload the pipeline folder with its model card, and return the address of the commit.

        The card of a run's pipeline has its data, clusters, FLOPs, scores, audit and `license_name`, an identifier of
        the Hub; `card` is a text of your own. `client` is an `HfApi`. Raises `PipelineError` if the Hub refuses the
        upload, and what reading the run raises.
        """
        if card is None and self.run is not None:
            card = render_model_card(self.run, repo_id, license_name)
        return super().push_to_hub(
            repo_id, card=card, commit_message=commit_message, private=private, token=token, client=client
        )


class DDMModularPipeline(EnsembleModularPipeline):
    """An ensemble whose experts are loaded and unloaded by name; a call loads those that it needs."""

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        max_memory: int | str | None = None,
        dtype: torch.dtype | None = None,
        scheduler: Any = None,
        text_encoder: Any = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """Open what `DDMPipeline.from_pretrained` opens, without its experts' weights; the arguments are the same."""
        folder, sampling, run = find_ensemble(name)
        super().__init__(
            folder,
            max_memory=max_memory,
            dtype=dtype,
            scheduler=scheduler or (SOLVER_SCHEDULERS[sampling.solver]() if run else None),
            text_encoder=text_encoder,
            revision=revision,
            token=token,
        )
        self.ensemble_pipeline.sampling = sampling


def find_ensemble(name: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], SamplingConfig, RunFolder | None]:
    """Return the ensemble of a run folder with its sampling settings and the run; any other name as it is.

    Raises `PipelineError` for a folder of neither kind, and what `find_pipeline` raises.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        run = RunFolder(path)
        return find_pipeline(run, monolith=False), sampling_of_run(run, run.load_config()), run
    if path.is_dir() and not (path / INDEX).is_file():
        raise PipelineError(f"{path} is neither a pipeline folder (no {INDEX}) nor a run folder (no config.yaml)")
    return name, SamplingConfig(), None


def sampling_of_run(run: RunFolder, config: RunConfig) -> SamplingConfig:
    """Return a run's sampling settings; `auto` is replaced by the selection that the run found."""
    return replace(config.ensemble, selection=resolve_selection(run, config.ensemble.selection))
