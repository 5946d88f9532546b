"""diffusers' `UNet2DConditionModel`: Stable Diffusion 1.5, and SDXL with its pooled vector and sizes.

With classes it also reads those.
"""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings, pixel_sizes

SIZE_NUMBERS = 6
"""Height and width of the original, corner of the crop, height and width of the target."""


def _data_settings(settings: Settings, data: DataShape) -> dict[str, Any]:
    values = {
        "sample_size": data.side,
        "in_channels": data.channels,
        "out_channels": data.channels,
        "cross_attention_dim": data.text_width,
        "num_class_embeds": data.num_classes + 1 if data.num_classes else None,
    }
    if _reads_pooled(settings):
        sizes_width = SIZE_NUMBERS * (settings["addition_time_embed_dim"] or 0)
        values["projection_class_embeddings_input_dim"] = sizes_width + data.pooled_width
    return values


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    rows = model.config.num_class_embeds
    added = None
    if _reads_pooled(model.config):
        sizes = pixel_sizes(inputs).repeat(1, SIZE_NUMBERS // 2)
        sizes[:, 2:4] = 0
        added = {"text_embeds": inputs.text.pooled, "time_ids": sizes}
    return {
        "sample": inputs.latents,
        "timestep": inputs.timestep,
        "encoder_hidden_states": inputs.text.sequence,
        "encoder_attention_mask": inputs.text.mask,
        "class_labels": None if rows is None else inputs.condition.embedding_index(rows - 1),
        "added_cond_kwargs": added,
        "return_dict": False,
    }


def _reads_pooled(settings: Settings) -> bool:
    return bool(settings["addition_embed_type"] == "text_time")


def _count_halvings(settings: Settings) -> int:
    return 1 << (len(settings["block_out_channels"]) - 1)


ADAPTER = Adapter(
    class_name="UNet2DConditionModel",
    module="unets.unet_2d_condition",
    data_settings=_data_settings,
    arguments=_arguments,
    reads_classes=True,
    reads_text=True,
    reads_pooled=_reads_pooled,
    side_multiple=_count_halvings,
    time_embedding="time_embedding",
)
