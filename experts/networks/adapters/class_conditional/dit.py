"""diffusers' `DiTTransformer2DModel`; it adds a row for the null class by itself."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "num_embeds_ada_norm": data.num_classes,
    }


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "class_labels": inputs.condition.embedding_index(model.config.num_embeds_ada_norm),
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="DiTTransformer2DModel",
    module="transformers.dit_transformer_2d",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_classes=True,
    is_square=True,
    has_lora=False,
)
