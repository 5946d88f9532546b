"""diffusers' `ChromaTransformer2DModel`; its mask covers the text's tokens and those of the image."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings, position_ids


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {"in_channels": 4 * data.channels, "joint_attention_dim": data.text_width}


def _arguments(_model: Any, inputs: CallInputs) -> dict[str, Any]:
    text, mask = inputs.text.sequence, inputs.text.mask
    joint_mask = mask.new_ones(len(mask), mask.shape[1] + inputs.latents.shape[1])
    joint_mask[:, : mask.shape[1]] = mask
    return {
        "hidden_states": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": text,
        "attention_mask": joint_mask,
        "img_ids": position_ids(inputs.latents, inputs.grid),
        "txt_ids": text.new_zeros(text.shape[1], 3),
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="ChromaTransformer2DModel",
    module="transformers.transformer_chroma",
    data_settings=_data_settings,
    arguments=_arguments,
    time="t",
    packs=True,
    reads_text=True,
    side_multiple=lambda _settings: 2,
    checkpointing_fault="diffusers drops the attention mask in its single blocks, which changes the gradients",
    has_attention_backends=True,
    time_embedding=r"distilled_guidance_layer\.in_proj",
)
