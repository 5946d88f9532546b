"""Our `ResidualMLP`, on latents of any shape; it reads the class, and the pooled vector of a text."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "latent_shape": data.latent_shape,
        "num_classes": data.num_classes,
        "pooled_width": data.pooled_width,
    }


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "noised": inputs.latents,
        "t": inputs.timestep,
        "class_index": inputs.condition.embedding_index(model.config.num_classes),
        "pooled_text": None if inputs.text is None else inputs.text.pooled,
    }


ADAPTER = Adapter(
    class_name="ResidualMLP",
    module="experts.architectures.residual_mlp",
    data_settings=_data_settings,
    arguments=_arguments,
    time="t",
    reads_classes=True,
    is_flat=True,
    checkpointing_fault="it has none of diffusers' blocks",
    has_lora=False,
    time_embedding="time_embedding",
    blocks=r"blocks\.\d+",
)
