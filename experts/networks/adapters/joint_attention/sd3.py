"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5; it has no mask, so it reads padding too."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "joint_attention_dim": data.text_width,
        "pooled_projection_dim": data.pooled_width,
    }


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "pooled_projections": inputs.text.pooled,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="SD3Transformer2DModel",
    module="transformers.transformer_sd3",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_text=True,
    reads_pooled=lambda _settings: True,
    reads_padding=True,
)
