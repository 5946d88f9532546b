"""The methods of a pipeline that load it from folders and the Hub, and write it to them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi

from ddm_core.artifacts import atomic_folder
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.components import expert_name, owner_of
from ensemble.pipelines.export import export_pipeline
from ensemble.pipelines.hub import MINIMAL_CARD, local_folder, upload
from ensemble.pipelines.optimizations import is_quantized, quantizing_loader
from ensemble.pipelines.paging import choose_loader
from ensemble.pipelines.schedulers import load_scheduler
from ensemble.pipelines.trusted_files import check_files
from experts.conditions.text_encoder import TextEncoder
from experts.conditions.unmasked_text_encoder import UnmaskedTextEncoder
from experts.expert_model import ExpertModel


class FolderMethods:
    """Pipelines as folders: ours, and repositories of the Hub."""

    @classmethod
    def from_ensemble(cls, pipeline: EnsemblePipeline, scheduler: Any = None, text_encoder: Any = None) -> Any:
        """Build the pipeline of a loaded ensemble; the default scheduler is flow matching's Euler.

        Raises `TextError` if the text encoder of its experts is not there.
        """
        if text_encoder is None and pipeline.text is not None:
            text_encoder = TextEncoder.from_config(pipeline.text)
        experts: dict[str, Any] = {expert_name(k): expert for k, expert in pipeline.ensemble.experts.items()}
        pipeline_class: Any = cls
        return pipeline_class(
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
            codec=pipeline.codec,
            router=pipeline.ensemble.router,
            text_encoder=text_encoder,
            class_names=pipeline.class_names,
            noise_schedule=pipeline.ensemble.noise_schedule.name,
            **experts,
        )

    @classmethod
    def from_pretrained(
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
    ) -> Any:
        """Load a pipeline folder, or a repository `owner/name` of the Hub; nothing in it is executed.

        `dtype` is that of the networks (default: as saved), `device_map` the device of all of them. `max_memory` is a
        number of bytes, or text such as `"4GB"`: experts that do not fit into it together are loaded when they are
        called. `quantization_config` is a `PipelineQuantizationConfig` of diffusers that names experts (default: all);
        it needs its library, and memory for one plain expert. `text_encoder` has `encode(captions)`; the default is
        that in the folder, or of the training. Raises `PipelineError` or an `ArtifactError` for a folder that cannot
        be loaded.
        """
        path = local_folder(str(name), revision, token)
        check_files(path)
        load: Callable[[Path], ExpertModel | None] | None
        load = None if max_memory is None else choose_loader(path, max_memory, dtype)
        if quantization_config is not None:
            if load is not None:
                raise PipelineError("experts that are loaded by need are not quantized; leave max_memory out")
            load = quantizing_loader(quantization_config, sorted(each.name for each in path.glob("expert_*")))
        loaded = EnsemblePipeline.from_pretrained(path, load)
        text_encoder = text_encoder or UnmaskedTextEncoder.find(path)
        pipeline = cls.from_ensemble(loaded, scheduler or load_scheduler(path / "scheduler"), text_encoder)
        if dtype is not None:
            pipeline.to(dtype)
        return pipeline if device_map is None else pipeline.to(device_map)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the pipeline folder; it appears complete or not at all, and replaces one that exists.

        Raises `PipelineError` while experts have adapters, or are quantized by diffusers.
        """
        pipeline: Any = self
        if quantized := [k for k, expert in pipeline.experts.items() if any(map(is_quantized, expert.networks()))]:
            raise PipelineError(
                f"expert {quantized[0]} was quantized when it was loaded, which is not saved; save the original, or "
                "compress it: ddm compress RUN quantize=int8_weight_only"
            )
        if adapters := pipeline.get_list_adapters():
            raise PipelineError(
                f"{next(iter(adapters))} has adapters, which are not saved; call unload_lora_weights first"
            )
        with atomic_folder(Path(folder).expanduser()) as temporary:
            self.to_ensemble_pipeline().save_pretrained(temporary)
            pipeline.scheduler.save_pretrained(temporary / "scheduler")
            if isinstance(encoder := owner_of(pipeline.text_encoder), UnmaskedTextEncoder):
                encoder.save(temporary)

    def export_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder with a generated `pipeline.py`, for readers who have diffusers and not this package.

        They load it with `trust_remote_code=True`; each image is sampled by one expert. Raises `PipelineError` for what
        diffusers lacks: networks or codecs of ours, few-step experts, other schedulers than flow matching's Euler.
        """
        export_pipeline(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        commit_message: str = "Upload an ensemble",
        private: bool | None = None,
        token: str | None = None,
        client: Any = None,
    ) -> str:
        """Upload the pipeline folder with its model card, and return the address of the commit.

        `card` is the text of the README, `client` an `HfApi`. Raises `PipelineError` if the Hub refuses the upload.
        """
        pipeline: Any = self
        text = MINIMAL_CARD.format(name=repo_id, count=len(pipeline.experts)) if card is None else card
        client = client or HfApi(token=token)
        with tempfile.TemporaryDirectory() as parent:
            self.save_pretrained(Path(parent) / "pipeline")
            folder = Path(parent) / "pipeline"
            return upload(folder, repo_id, text, commit_message, private=private, client=client)

    def to_ensemble_pipeline(self) -> EnsemblePipeline:
        """Return the ensemble with its codec, without diffusers' parts."""
        pipeline: Any = self
        return EnsemblePipeline(
            ensemble=pipeline.ensemble,
            codec=owner_of(pipeline.codec),
            num_classes=pipeline.num_classes,
            class_names=tuple(pipeline.config.class_names),
            text=getattr(owner_of(pipeline.text_encoder), "config", None),
        )
