"""diffusers' `ZImageTransformer2DModel`; it takes lists of latents with a frame axis, and of texts without padding.

Its t is 1 for clean samples, and its velocity points to them.
"""

from typing import Any

from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape, Settings


def _data_settings(_settings: Settings, data: DataShape) -> dict[str, Any]:
    return {"in_channels": data.channels, "cap_feat_dim": data.text_width}


def _arguments(model: Any, inputs: CallInputs) -> dict[str, Any]:
    return {
        "x": list(inputs.latents.unsqueeze(2)),
        "t": inputs.timestep,
        "cap_feats": [sequence[mask] for sequence, mask in zip(inputs.text.sequence, inputs.text.mask, strict=True)],
        "patch_size": model.config.all_patch_size[0],
        "return_dict": False,
    }


ADAPTER = Adapter(
    class_name="ZImageTransformer2DModel",
    module="transformers.transformer_z_image",
    data_settings=_data_settings,
    arguments=_arguments,
    time="1 - t",
    sign=-1,
    reads_text=True,
    reads_lengths=True,
    side_multiple=lambda settings: int(settings["all_patch_size"][0]),
    has_attention_backends=True,
    time_embedding="t_embedder",
    blocks=r"layers\.\d+",
)
