"""diffusers' `SanaTransformer2DModel`."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "caption_channels": data.text_width,
    }


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep * model.config.timestep_scale,
        "encoder_hidden_states": inputs.text.sequence,
        "encoder_attention_mask": inputs.text.mask,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="SanaTransformer2DModel",
    module="transformers.sana_transformer",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_text=True,
)
