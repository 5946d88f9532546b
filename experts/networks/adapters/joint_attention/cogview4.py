"""diffusers' `CogView4Transformer2DModel`; images count as not cropped.

It reads padding too: diffusers adds its mask of zeros and ones to the attention's logits, which hides nothing.
"""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings, pixel_sizes


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "text_embed_dim": data.text_width,
    }


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    sizes = pixel_sizes(inputs)
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": sizes.new_zeros(sizes.shape),
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="CogView4Transformer2DModel",
    module="transformers.transformer_cogview4",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_text=True,
    reads_padding=True,
    block_output=0,
)
