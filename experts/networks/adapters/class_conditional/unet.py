"""diffusers' `UNet2DModel`; its class embedding has a row for the null class."""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "num_class_embeds": data.num_classes + 1,
    }


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    rows = model.config.num_class_embeds
    return {
        "sample": inputs.latents,
        "timestep": inputs.timestep,
        "class_labels": None if rows is None else inputs.condition.embedding_index(rows - 1),
        "return_dict": False,
    }


def count_halvings(settings: Settings) -> int:
    """Return the number that a U-Net's sides must be divisible by: each level after the first halves them."""
    return 1 << (len(settings["block_out_channels"]) - 1)


ADAPTER = Adapter(
    class_name="UNet2DModel",
    module="unets.unet_2d",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_classes=True,
    side_multiple=count_halvings,
    has_lora=False,
    time_embedding="time_embedding",
    blocks="",
)
