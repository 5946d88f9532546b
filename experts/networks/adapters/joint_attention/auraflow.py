"""diffusers' `AuraFlowTransformer2DModel`; it has no mask, so it reads padding too."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "joint_attention_dim": data.text_width,
    }


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="AuraFlowTransformer2DModel",
    module="transformers.auraflow_transformer_2d",
    data_settings=_data_settings,
    arguments=_arguments,
    time="t",
    reads_text=True,
    reads_padding=True,
    time_embedding="time_step_proj",
)
