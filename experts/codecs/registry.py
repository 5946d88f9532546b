"""The latent spaces that can be chosen, and how each is fitted and read.

To add one, write a class with the four members of `codec.Codec` and a function that fits it, and add a row to
`CODECS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CorruptArtifact, Workspace, read_json
from experts.codec import Codec, PixelCodec
from experts.codecs.pca import fit_pca_codec, load_pca_codec
from experts.codecs.pca_conv import fit_pca_conv, load_pca_conv
from experts.config import CodecConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecKind:
    """How one kind of codec is fitted to a shard folder, and read from its own folder and `codec.json`."""

    fit: Callable[[CodecConfig, Path, Path, Workspace], float]
    """(config, shards, out, workspace) to the FLOPs that were counted; writes the codec to `out`."""
    load: Callable[[Path, dict[str, Any]], Codec]


def fit_codec(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    """Fit the codec on the images of a shard folder, write it to `out`, and return its training FLOPs."""
    out.mkdir(parents=True, exist_ok=True)
    return CODECS[config.kind].fit(config, shards, out, workspace)


def load_codec(folder: Path) -> Codec:
    """Read what `fit_codec` wrote; raises an `ArtifactError` if a file is missing or broken."""
    described = read_json(folder / "codec.json")
    kind = described.get("kind") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in CODECS:
        raise CorruptArtifact(f"{folder / 'codec.json'} is of kind {kind!r}; known are {', '.join(CODECS)}")
    try:
        return CODECS[kind].load(folder, described)
    except (KeyError, TypeError, ValueError, FileNotFoundError, SafetensorError) as error:
        raise CorruptArtifact(f"{folder} does not hold a whole codec ({error}); fit it again") from error


def _fit_pixels(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    PixelCodec(image_shape=read_index(shards).image_shape).save(out)
    return 0.0


def _load_pixels(folder: Path, described: dict[str, Any]) -> Codec:
    return PixelCodec(image_shape=tuple(described["image_shape"]))


def _fit_pca(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    fit_pca_codec(config, shards).save(out)
    return 0.0


CODECS: dict[str, CodecKind] = {
    "pixels": CodecKind(fit=_fit_pixels, load=_load_pixels),
    "pca": CodecKind(fit=_fit_pca, load=load_pca_codec),
    "pca_conv": CodecKind(fit=fit_pca_conv, load=load_pca_conv),
}
