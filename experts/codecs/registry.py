"""Registry of codecs, each with its fit and load functions.

To add one, write a class with the four members of `codec.Codec`, a fit and a load function, and add a row to `CODECS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import FiniteFloat, PositiveInt
from safetensors import SafetensorError
from torch import Tensor, nn
from typing_extensions import TypedDict

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CorruptArtifact, Workspace, read_json
from ddm_core.json_values import from_json
from experts.codec import Codec, PixelCodec
from experts.codecs.autoencoder import fit_published, load_autoencoder_codec
from experts.codecs.autoencoder_training import fit_autoencoder, probe_autoencoder
from experts.codecs.patch_pca import fit_patch_pca_codec, load_patch_pca_codec
from experts.codecs.pca import fit_pca_codec, load_pca_codec
from experts.codecs.refined import fit_refined_codec, load_refined_codec, probe_decoder
from experts.config import CodecConfig
from experts.networks.latent_shapes import latent_shape_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecKind:
    """Fit and load functions of one kind of codec."""

    fit: Callable[[CodecConfig, Path, Path, Workspace], float]
    """Maps (config, shards, out, workspace) to the counted FLOPs, and writes the codec to `out`."""
    load: Callable[[Path, dict[str, Any]], Codec]
    """Maps (folder, content of `codec.json`) to the codec."""
    probe: Callable[..., tuple[nn.Module, Callable[[], Tensor]]] | None = None
    """Maps (config, image shape, rows=1) to a new network of the kind that the fit trains, and its call on them."""
    stored_type: torch.dtype = torch.float32
    """Type of latents on the disk. An autoencoder loses more than the rounding to 16 bits does."""


class _Metadata(TypedDict):
    """Keys of a `codec.json`."""

    kind: str
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Height, width, channels."""
    whitening: NotRequired[FiniteFloat]
    patch_size: NotRequired[PositiveInt]


def fit_codec(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    """Fit the codec on the images of a shard folder, write it to `out`, and return its training FLOPs.

    Raises `CodecError` if it does not fit the images.
    """
    height, width, channels = read_index(shards).image_shape
    for side in (height, width):
        latent_shape_of(config, side, channels)
    out.mkdir(parents=True, exist_ok=True)
    return CODECS[config.kind].fit(config, shards, out, workspace)


def load_codec(folder: Path) -> Codec:
    """Load a folder that `fit_codec` wrote; raise an `ArtifactError` if a file is missing or invalid."""
    kind = _read_kind(folder)
    try:
        return CODECS[kind].load(folder, dict(from_json(_Metadata, read_json(folder / "codec.json"))))
    except (KeyError, TypeError, ValueError, FileNotFoundError, SafetensorError) as error:
        raise CorruptArtifact(f"{folder} does not hold a valid codec ({error}); fit it again") from error


def stored_type(folder: Path) -> torch.dtype:
    """Return the type in which a codec's latents are stored; raise like `load_codec`."""
    return CODECS[_read_kind(folder)].stored_type


def _read_kind(folder: Path) -> str:
    metadata = read_json(folder / "codec.json")
    kind = metadata.get("kind") if isinstance(metadata, dict) else None
    if not isinstance(kind, str) or kind not in CODECS:
        raise CorruptArtifact(
            f"{folder / 'codec.json'} must have a kind of {', '.join(CODECS)}; got {kind!r}; fit the codec again"
        )
    return kind


def _fit_pixels(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    PixelCodec(image_shape=read_index(shards).image_shape).save(out)
    return 0.0


def _load_pixels(folder: Path, metadata: dict[str, Any]) -> Codec:
    return PixelCodec(image_shape=tuple(metadata["image_shape"]))


def _fit_pca(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    fit_pca_codec(config, shards).save(out)
    return 0.0


def _fit_patch_pca(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    fit_patch_pca_codec(config, shards).save(out)
    return 0.0


TRAINED_AUTOENCODER = CodecKind(
    fit=fit_autoencoder, load=load_autoencoder_codec, probe=probe_autoencoder, stored_type=torch.float16
)

CODECS: dict[str, CodecKind] = {
    "pixels": CodecKind(fit=_fit_pixels, load=_load_pixels),
    "pca": CodecKind(fit=_fit_pca, load=load_pca_codec),
    "patch_pca": CodecKind(fit=_fit_patch_pca, load=load_patch_pca_codec),
    "pca_conv": CodecKind(fit=fit_refined_codec, load=load_refined_codec, probe=probe_decoder),
    "patch_pca_conv": CodecKind(fit=fit_refined_codec, load=load_refined_codec, probe=probe_decoder),
    "autoencoder": CodecKind(fit=fit_published, load=load_autoencoder_codec, stored_type=torch.float16),
    "autoencoder_tiny": TRAINED_AUTOENCODER,
    "autoencoder_kl": TRAINED_AUTOENCODER,
    "autoencoder_dc": TRAINED_AUTOENCODER,
}
