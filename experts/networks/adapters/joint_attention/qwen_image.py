"""diffusers' `QwenImageTransformer2DModel`; packed tokens have positions by the shapes of the images."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "in_channels": 4 * data.channels,
        "out_channels": data.channels,
        "joint_attention_dim": data.text_width,
    }


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "encoder_hidden_states_mask": inputs.text.mask,
        "img_shapes": [[(1, *inputs.grid)]] * len(inputs.latents),
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="QwenImageTransformer2DModel",
    module="transformers.transformer_qwenimage",
    data_settings=_data_settings,
    arguments=_arguments,
    time="t",
    packs=True,
    reads_text=True,
    has_attention_backends=True,
)
