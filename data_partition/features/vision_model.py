"""Features of a vision network of transformers, from a folder or the Hub: DINOv2, DINOv3, SigLIP, CLIP and their kin.

The extractor's folder has a copy of the network's files, so that a partition needs nothing else. No code of a
repository is executed, and weights are safetensors.
"""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_partition.errors import MissingExtra, UnknownExtractor
from data_partition.features.cnn_input import cnn_input, resize_to_rgb
from data_partition.features.pca import l2_normalize
from ddm_core.hub_files import HubError, download_snapshot

FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of the channels, for a folder without `preprocessor_config.json`."""
ROWS = 32
"""Images at a time."""


@dataclass(frozen=True)
class VisionFeatures:
    """The pooled output of a network, or its first token, at the size and with the scale of its preprocessor.

    Images are scaled to its square, with antialiasing, and not cropped.
    """

    folder: Path

    @classmethod
    def fit(cls, path: Path, components: int, seed: int) -> "VisionFeatures":
        """Return the network of a folder or a repository of the Hub; nothing is fitted. Raises like `open`."""
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "VisionFeatures":
        """Return the network of a folder or a repository of the Hub; raises `MissingExtra` or `UnknownExtractor`."""
        folder = path.expanduser()
        try:
            features = cls(folder if folder.is_dir() else download_snapshot(str(path), FILES))
        except HubError as error:
            raise UnknownExtractor(
                f"{path} is no folder of a vision network, and the Hub does not give it: {error}"
            ) from error
        features.network  # noqa: B018 - a folder that holds none is an error here
        return features

    @cached_property
    def network(self) -> Any:
        """Load the part of the network that reads images."""
        try:
            import transformers
        except ImportError as error:
            raise MissingExtra(
                "a vision network needs transformers: pip install 'decentralized-diffusion[text]'"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        try:
            model = transformers.AutoModel.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UnknownExtractor(f"{self.folder} does not hold a vision network of transformers: {reason}") from error
        part: Any = getattr(model, "vision_model", model)
        if getattr(part, "main_input_name", "") != "pixel_values":
            raise UnknownExtractor(f"{self.folder} holds a {type(model).__name__}, which reads no images; name another")
        return part.eval().requires_grad_(False)

    @cached_property
    def settings(self) -> tuple[int, Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
        """Return side, mean and deviation of the images that the network reads."""
        file = self.folder / "preprocessor_config.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        mean, deviation = found.get("image_mean", IMAGENET[0]), found.get("image_std", IMAGENET[1])
        size = found.get("crop_size") or found.get("size") or self.network.config.image_size
        side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        return int(side), torch.tensor(mean)[:, None, None], torch.tensor(deviation)[:, None, None]

    @cached_property
    def dimension(self) -> int:
        """Return the number of channels of the output."""
        return int(self(np.zeros((1, 8, 8, 3), np.uint8)).shape[1])

    @property
    def flops_per_image(self) -> float:
        """Count the FLOPs of one image."""
        with FlopCounterMode(display=False) as counter:
            self(np.zeros((1, 8, 8, 3), np.uint8))
        return float(counter.get_total_flops())

    @property
    def fit_flops_per_image(self) -> float:
        """Return 0: nothing is fitted."""
        return 0.0

    @torch.inference_mode()
    def __call__(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
        """Return pooled outputs, each row of Euclidean length one."""
        side, mean, deviation = self.settings
        rows = []
        for part in torch.split((cnn_input(images, side).contiguous() - mean) / deviation, ROWS):
            output = self.network(pixel_values=part)
            pooled = getattr(output, "pooler_output", None)
            rows.append(output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1))
        return l2_normalize(torch.cat(rows).numpy())

    @torch.no_grad()
    def compute_patches(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch feature row column"]:
        """Return the last features of every patch, of images from 0 to 1; of convolutions, of every position."""
        side, mean, deviation = self.settings
        scaled = (resize_to_rgb(images, side) - mean.to(images.device)) / deviation.to(images.device)
        hidden: Tensor = self.network.to(images.device)(pixel_values=scaled).last_hidden_state
        if hidden.ndim == 4:
            return hidden
        rows = side // self.network.config.patch_size
        patches = hidden[:, -rows * rows :]  # class and register tokens are before those of the patches
        return patches.transpose(1, 2).reshape(len(images), -1, rows, rows)

    def save(self, folder: Path) -> None:
        """Copy the network's files."""
        for pattern in FILES:
            for path in sorted(self.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)

    @classmethod
    def load(cls, folder: Path) -> "VisionFeatures":
        """Open what `save` wrote."""
        return cls(folder)
