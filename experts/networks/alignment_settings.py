"""Whether a network can be aligned with a teacher's features, by its settings alone; imports no torch."""

from pathlib import Path

from experts.config import ExpertConfig
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.class_settings import NetworkError, class_settings, default_settings

DEPTHS = ("num_layers", "num_mmdit_layers", "depth", "n_layers")
"""Names that the classes give their number of blocks."""


def check_alignment(config: ExpertConfig) -> None:
    """Raise `NetworkError` for a network without such a block, or a teacher's folder that holds no network."""
    network = class_settings(config.network)
    if "Transformer" not in network.class_name:
        raise NetworkError(
            f"expert.align_weight={config.align_weight:g} aligns the tokens of a transformer, and {network.class_name} "
            "has none; choose one such as expert=dit, or set expert.align_weight=0"
        )
    if not network.adapter.has_image_tokens:
        able = ", ".join(name for name, other in ADAPTERS.items() if other.has_image_tokens and "Transformer" in name)
        raise NetworkError(
            f"expert.align_weight={config.align_weight:g} aligns the tokens of an image, and the blocks of "
            f"{network.class_name} return those of image and text together; choose one of {able}, or set "
            "expert.align_weight=0"
        )
    values = dict(default_settings(network.adapter)) | dict(network.settings)
    depth = next((int(values[name]) for name in DEPTHS if name in values), None)
    if depth is not None and config.align_block > depth:
        raise NetworkError(
            f"expert.align_block={config.align_block} is past the {depth} blocks of {network.class_name}; set it to "
            f"at most {depth}"
        )
    folder = Path(config.align_path or "")
    if config.align_path and folder.is_absolute() and not (folder / "config.json").is_file():
        raise NetworkError(
            f"expert.align_path={folder} has no config.json, so it is no vision network of transformers; name its "
            "folder, or a repository of the Hub such as facebook/dinov2-base"
        )
