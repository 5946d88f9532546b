"""diffusers' `PRXTransformer2DModel`, on latents, or on pixels with large patches and a `bottleneck_size`."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {"in_channels": data.channels, "context_in_dim": data.text_width}


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "attention_mask": inputs.text.mask,
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="PRXTransformer2DModel",
    module="transformers.transformer_prx",
    data_settings=_data_settings,
    arguments=_arguments,
    time="t",
    reads_text=True,
    has_lora=False,
    has_attention_backends=True,
    time_embedding="time_in",
    blocks=r"blocks\.\d+",
)
