"""diffusers' `PixArtTransformer2DModel`."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings, pixel_sizes


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "caption_channels": data.text_width,
    }


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    added = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes = pixel_sizes(inputs)
        added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "encoder_attention_mask": inputs.text.mask,
        "added_cond_kwargs": added,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="PixArtTransformer2DModel",
    module="transformers.pixart_transformer_2d",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_text=True,
    has_lora=False,
)
