"""diffusers' autoencoders as codecs: deterministic latents of about unit scale, each class by its own scaling.

* AutoencoderKL: the mode of its distribution, by its mean and deviation a channel, or by its shift and scale
* AutoencoderTiny, AutoencoderDC: latents without a distribution, by their shift and scale
* AutoencoderKLFlux2: the mode, in squares of 2 x 2, by the running statistics of a batch norm
* AutoencoderRAE: images in [0, 1]; it scales its latents itself

All of them run in float32, since the half precision of some (`force_upcast`) overflows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_partition.shards.shards import read_index
from ddm_core.artifacts import Workspace, write_json
from experts.codec import PixelCodec
from experts.config import CodecConfig
from experts.errors import CodecError
from experts.networks.autoencoder_files import AUTOENCODERS, LatentGrid, find_folder, read_grid
from experts.networks.model_io import load_model, read_class_name, save_model
from experts.types import DecodedImages, Images, ImageTensor, Latents

BATCH_PIXELS = 2**19
"""Pixels of the images that one call encodes or decodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderCodec:
    """Encodes and decodes with an autoencoder of diffusers; gray images become three channels and back."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    model: nn.Module

    @property
    def grid(self) -> LatentGrid:
        """Return the images that the model takes, and the grid of its latents."""
        return model_grid(self.model)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return channels, height and width of a latent."""
        return self.grid.shape(self.image_shape)

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32 in CPU memory; they are computed on torch's default device."""
        pixels = PixelCodec(image_shape=self.image_shape).encode(images).expand(-1, self.grid.image_channels, -1, -1)
        return self._in_batches(to_latents, pixels, torch.get_default_device())

    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]; they are computed where the latents are."""
        images = self._in_batches(to_images, latents.float(), latents.device)
        if self.image_shape[2] == 1:
            images = images.mean(dim=1, keepdim=True)
        return PixelCodec(image_shape=self.image_shape).decode(images)

    def with_size(self, height: int, width: int) -> "AutoencoderCodec":
        """Return the codec for images of this size; raise `CodecError` if the model does not take it."""
        resized = replace(self, image_shape=(height, width, self.image_shape[2]))
        self.grid.shape(resized.image_shape)
        return resized

    def save(self, folder: Path) -> None:
        """Write `codec.json` and, below `autoencoder/`, the model."""
        write_json(folder / "codec.json", {"kind": "autoencoder", "image_shape": self.image_shape})
        save_model(self.model, folder / "autoencoder")

    @torch.no_grad()
    def _in_batches(self, call: Callable[[Any, Tensor], Tensor], inputs: Tensor, device: torch.device) -> Tensor:
        size = max(1, BATCH_PIXELS // (self.image_shape[0] * self.image_shape[1]))
        model = self.model.to(device)
        return torch.cat([call(model, batch.to(device)).cpu() for batch in torch.split(inputs, size)])


def to_latents(model: Any, images: ImageTensor) -> Latents:
    """Return the scaled latents of images in [-1, 1]."""
    if type(model).__name__ == "AutoencoderRAE":
        return raw_latents(model, images.add(1).div(2))
    shift, scale = _shift_and_scale(model)
    return (_pack(model, raw_latents(model, images)) - shift) * scale


def to_images(model: Any, latents: Latents) -> ImageTensor:
    """Return the images in about [-1, 1] of scaled latents."""
    if type(model).__name__ == "AutoencoderRAE":
        decoded: Tensor = model.decode(latents, return_dict=False)[0]
        return decoded.mul(2).sub(1)
    shift, scale = _shift_and_scale(model)
    images: Tensor = model.decode(_unpack(model, latents / scale + shift), return_dict=False)[0]
    return images


def raw_latents(model: Any, images: ImageTensor) -> Latents:
    """Return the latents as the model gives them, of a distribution its mode."""
    code = model.encode(images, return_dict=False)[0]
    latents: Tensor = code if isinstance(code, Tensor) else code.mode()
    return latents


def _shift_and_scale(model: Any) -> tuple[Tensor, Tensor]:
    """Return what is subtracted from the latents, and the factor that then gives them unit scale."""
    config, like = model.config, next(model.parameters())
    if hasattr(model, "bn"):
        deviation = torch.sqrt(model.bn.running_var + config.batch_norm_eps)
        return model.bn.running_mean.view(-1, 1, 1), 1 / deviation.view(-1, 1, 1)
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    deviation = like.new_tensor(config.get("latents_std") or [1.0])
    return like.new_tensor(shift).view(-1, 1, 1), config.scaling_factor / deviation.view(-1, 1, 1)


def _pack(model: Any, latents: Tensor) -> Tensor:
    return functional.pixel_unshuffle(latents, 2) if hasattr(model, "bn") else latents


def _unpack(model: Any, latents: Tensor) -> Tensor:
    return functional.pixel_shuffle(latents, 2) if hasattr(model, "bn") else latents


def model_grid(model: Any) -> LatentGrid:
    """Return the images that a model takes, and the grid of its latents."""
    return read_grid(dict(model.config) | {"_class_name": type(model).__name__})


def fit_published(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    """Copy the autoencoder at `codec.path` to `out`; raise `CodecError` if that fails."""
    model = load_autoencoder(find_folder(config))
    AutoencoderCodec(image_shape=read_index(shards).image_shape, model=model).save(out)
    return 0.0


def load_autoencoder_codec(folder: Path, metadata: dict[str, Any]) -> AutoencoderCodec:
    """Load a folder that `AutoencoderCodec.save` wrote; `metadata` is its `codec.json`."""
    model = load_autoencoder(folder / "autoencoder")
    codec = AutoencoderCodec(image_shape=tuple(metadata["image_shape"]), model=model)
    codec.grid.shape(codec.image_shape)
    return codec


def load_autoencoder(folder: Path) -> nn.Module:
    """Load an autoencoder from `config.json` and safetensors; raise `CorruptArtifact`, or `CodecError` for a package.

    Its parameters are copies in float32: results do not depend on where a file is mapped in memory.
    """
    name = read_class_name(folder, AUTOENCODERS)
    if name == "AutoencoderRAE" and find_spec("transformers") is None:
        raise CodecError("AutoencoderRAE needs transformers, which is not installed: pip install transformers")
    return load_model((getattr(diffusers, name),), folder)
