"""diffusers' `Lumina2Transformer2DModel`; its t is 1 for clean samples, and its velocity points to them."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {"sample_size": data.side, "in_channels": data.channels, "cap_feat_dim": data.text_width}


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "encoder_attention_mask": inputs.text.mask,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="Lumina2Transformer2DModel",
    module="transformers.transformer_lumina2",
    data_settings=_data_settings,
    arguments=_arguments,
    time="1 - t",
    sign=-1,
    reads_text=True,
    reads_lengths=True,
    blocks=r"layers\.\d+",
    has_image_tokens=False,
)
