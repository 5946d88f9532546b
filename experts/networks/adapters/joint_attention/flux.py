"""diffusers' `FluxTransformer2DModel`; it has no mask, so it reads padding too.

A network that was distilled with guidance gets the scale 1, at which it follows the data.
"""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings, position_ids


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "in_channels": 4 * data.channels,
        "joint_attention_dim": data.text_width,
        "pooled_projection_dim": data.pooled_width,
    }


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    text = inputs.text.sequence
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": text,
        "pooled_projections": inputs.text.pooled,
        "img_ids": position_ids(inputs.latents, inputs.grid),
        "txt_ids": text.new_zeros(text.shape[1], 3),
        "guidance": inputs.timestep.new_ones(len(text)) if model.config.guidance_embeds else None,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="FluxTransformer2DModel",
    module="transformers.transformer_flux",
    data_settings=_data_settings,
    arguments=_arguments,
    time="t",
    packs=True,
    reads_text=True,
    reads_pooled=lambda _settings: True,
    reads_padding=True,
    side_multiple=lambda _settings: 2,
    has_attention_backends=True,
)
