"""The methods of a pipeline that load LoRA adapters into its experts, with the names of diffusers' pipelines."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.components import expert_ids, expert_name
from ensemble.pipelines.paging import PagedExpert
from experts.networks.lora import adapter_names, add_lora, read_lora, remove_lora, set_weights


class AdapterMethods:
    """LoRA on one, several or all experts of a pipeline."""

    def load_lora_weights(
        self,
        path: str | os.PathLike[str],
        *,
        experts: Sequence[int] | None = None,
        adapter_name: str = "default",
        weight: float = 1.0,
    ) -> None:
        """Add an adapter to these experts (default: all), beside those that they have.

        Experts that are loaded by need are loaded once, and get it again whenever they are loaded.

        `path` is a safetensors file of diffusers or peft, a folder with one, or a folder of `ddm finetune` with one for
        each expert; `weight` multiplies its change. Raises `AdapterError` for a file that is no LoRA or fits no layer,
        and `PipelineError` for experts that are not there.
        """
        experts_by_id, folder = self._adaptable(), Path(path).expanduser()
        own = {k: folder / expert_name(k) for k in experts_by_id if (folder / expert_name(k)).is_dir()}
        chosen = list(own or experts_by_id) if experts is None else list(experts)
        if absent := sorted(set(chosen) - set(experts_by_id)):
            raise PipelineError(f"there is no expert {absent[0]}; the experts are {', '.join(map(str, experts_by_id))}")
        loras = {k: read_lora(own.get(k, folder)) for k in chosen}
        for k, lora in loras.items():
            expert = experts_by_id[k]
            if isinstance(expert, PagedExpert):
                expert.add_lora(lora, adapter_name, weight)
            else:
                add_lora(expert, lora, adapter_name, weight)

    def set_adapters(self, adapter_names: Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Use these adapters, with these weights (default: 1), and no others; they stay loaded.

        Raises `PipelineError` for an adapter that no expert has.
        """
        known = self.get_list_adapters()
        loaded = {name for names in known.values() for name in names}
        if absent := sorted(set(adapter_names) - loaded):
            raise PipelineError(
                f"no expert has an adapter {absent[0]!r}; loaded are {', '.join(sorted(loaded)) or 'none'}"
            )
        pairs = zip(adapter_names, weights or [1.0] * len(adapter_names), strict=True)
        by_name = dict(pairs)
        for expert in self._adaptable().values():
            if isinstance(expert, PagedExpert):
                expert.set_adapters(by_name)
            else:
                set_weights(expert, by_name)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of the adapters of each expert that has some."""
        found = {
            expert_name(k): expert.adapter_names if isinstance(expert, PagedExpert) else adapter_names(expert)
            for k, expert in self._adaptable().items()
        }
        return {name: names for name, names in found.items() if names}

    def unload_lora_weights(self) -> None:
        """Remove all adapters; every expert has its own layers again, byte for byte."""
        for expert in self._adaptable().values():
            if isinstance(expert, PagedExpert):
                expert.remove_adapters()
            else:
                remove_lora(expert)

    def fuse_lora(self) -> None:
        """Refuse: fused weights are rounded, and cannot be separated again."""
        raise PipelineError(
            "fusing rounds an adapter into the weights, and unfusing leaves other bytes; sample with the adapter loaded"
        )

    def _adaptable(self) -> dict[int, nn.Module | PagedExpert]:
        """Return the experts' networks; of experts that are loaded by need, the experts."""
        pipeline: Any = self
        return {k: pipeline._paged.get(k) or getattr(pipeline, expert_name(k)) for k in expert_ids(pipeline.config)}
