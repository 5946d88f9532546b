"""Configuration of a data set and its partition; imports no torch."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED, UNHASHED_IF_DEFAULT
from ddm_core.seeds import Seed
from ddm_core.url_queries import hide_queries, without_secrets

MAX_FEATURES = 8192
"""Most features of a principal component analysis: a covariance takes half a gigabyte, its eigenvectors minutes."""

MIN_SIDE = 4
"""Fewest pixels of a side."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The source of the images, their size, and the held-out share."""

    source: Literal["fashion", "emoji", "fashion_full", "digits", "image_folder", "webdataset", "parquet"] = "fashion"
    """Origin of the images; `data_partition/datasets/sources.py` has one function for each."""

    mode: Literal["copy", "stream"] = field(default="copy", metadata=UNHASHED_IF_DEFAULT)
    """`copy`: images are resized once, and written into shards of the run. `stream`, for `webdataset`: they stay where
    they are; the run keeps a table of where each one is, and reads and resizes an image whenever it needs it."""

    store_latents: bool | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """With `mode=stream`, whether latents are stored before trainings, instead of images being encoded while networks
    train. None: unless the codec is `pixels`, whose latents are larger than the images; always with
    `aspect_buckets`."""

    engine: Literal["local", "ray"] = field(default="local", metadata=UNHASHED)
    """Where the stages `dataset`, `features`, `latents` and `partition` compute: in their own process, or with Ray Data
    on `compute.stages.<kind>.workers` processes of the Ray cluster; both give the same bytes."""

    path: str | None = None
    """Folder of images, or a brace-expanded URL of tars; only some sources need one.
    The query of a URL, where a signature is, stays in a file of this user (`ddm_core/url_queries.py`)."""

    image_size: Annotated[int, Field(ge=MIN_SIDE, le=2048)] = 28
    """Side of the square images in pixels."""

    channels: Literal[1, 3] = 1
    """1 is grey, 3 is RGB; images are converted."""

    fit: Literal["exact", "crop", "pad"] = "exact"
    """`exact`: an image of another size is an error. `crop`: scale the shorter side, cut out the middle. `pad`: scale
    the longer side, fill the rest with white."""

    aspect_buckets: tuple[Annotated[str, Field(pattern=r"^[1-9]\d{0,3}x[1-9]\d{0,3}$")], ...] = field(
        default=(), metadata=UNHASHED_IF_DEFAULT
    )
    """Sizes beside the square, as width x height, such as `[48x32,32x48]`: every image gets the one of the nearest
    aspect ratio, and every batch of a training is of one size. Clustering and scores see the middle square."""

    labels: bool = True
    """Whether every sample must carry a class; without labels the models are unconditional, and no class is read."""

    captions: bool = False
    """Whether captions are read and stored; samples without one are counted.
    `emoji` and `fashion` have their own.
    `image_folder`: `x.txt` or `x.caption` beside `x.png`, or `metadata.jsonl|csv|parquet` with a column `file_name`.
    `webdataset`: `.txt`, or a field of `.json`. `parquet`: a column."""

    caption_key: str | None = None
    """Column of a table or field of `.json` that holds the caption, before a text file beside the image; None:
    `caption`, else `text`, where there is no such file."""

    more_captions: dict[str, Annotated[float, Field(gt=0)]] | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Further columns or fields that hold a caption of the same sample, each with how often it is trained on for once
    of the first caption, such as `{short: 0.5}`."""

    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of samples held out from training as the reference for scores, chosen by a hash of their keys.
    A source with a test set of its own uses that instead."""

    held_out_captions: tuple[str, ...] = ()
    """Words that are never trained on together, such as `dark bag`: a sample whose caption has all the words of an
    entry is held out."""

    duplicates: Literal["keep", "remove"] = field(default="keep", metadata=UNHASHED_IF_DEFAULT)
    """`remove` leaves out images that repeat an earlier one, also mirrored, slightly cropped or saved with loss: what
    is there often is memorized."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of training samples."""

    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Maximum share of unreadable images; they are skipped and logged by name, and a larger share is an error."""

    shard_samples: Annotated[int, Field(ge=1)] = 2048
    """Maximum number of samples in one shard."""

    version: str = ""
    """Any text; change it when the files at `path` have changed, so that the data are read again."""

    flip: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether half of the training images are mirrored, others in every epoch: with few images, for things that may
    face either way. Not for text, digits or captions of left and right."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the (height, width) of the square and of all buckets."""
        buckets = ((int(height), int(width)) for width, height in (size.split("x") for size in self.aspect_buckets))
        return (self.image_size, self.image_size), *buckets

    @property
    def shown_path(self) -> str:
        """Return the path for a person, without the queries of URLs."""
        return without_secrets(str(self.path)) if "://" in str(self.path) else str(self.path)

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Make the path absolute, so that a run may be resumed from another folder; hide the queries of URLs."""
        if path is None or "://" not in path:
            return path if path is None else str(Path(path).expanduser().absolute())
        return hide_queries(path)

    @model_validator(mode="after")
    def _has_a_path(self) -> "DataConfig":
        """Check that a source outside the package has a path."""
        if self.path is None and self.source in ("image_folder", "webdataset", "parquet"):
            raise ValueError(f"source {self.source} needs data.path=…, the folder or URL with the images")
        return self

    @model_validator(mode="after")
    def _streams_from_tars(self) -> "DataConfig":
        """Check that images which stay where they are can be read there, and of several sizes their latents."""
        if self.mode == "copy" and self.store_latents is not None:
            raise ValueError("data.store_latents needs data.mode=stream; a copied data set always stores its latents")
        if self.mode == "stream" and self.source != "webdataset":
            raise ValueError(
                f"data.mode=stream reads ranges of tars, and data.source={self.source} has none; set "
                "data.source=webdataset with data.path=…tar, or data.mode=copy"
            )
        if self.aspect_buckets and self.store_latents is False:
            raise ValueError(
                "data.store_latents=false reads the images of a batch from blocks of shards, and with "
                "data.aspect_buckets a batch has those of one size alone; set data.store_latents=true, or leave the "
                "buckets out"
            )
        return self

    @model_validator(mode="after")
    def _has_different_buckets(self) -> "DataConfig":
        """Check that images may be brought to the sizes of the buckets, each a size of its own."""
        if self.aspect_buckets and self.fit == "exact":
            raise ValueError("data.aspect_buckets needs data.fit=crop or data.fit=pad, since images are scaled to them")
        if len(set(self.sizes)) < len(self.sizes) or min(map(min, self.sizes)) < MIN_SIDE:
            raise ValueError(
                f"data.aspect_buckets must be different sizes beside {self.image_size}x{self.image_size}, of sides of "
                f"{MIN_SIDE} pixels or more; got {', '.join(self.aspect_buckets)}"
            )
        return self

    @model_validator(mode="after")
    def _has_captions_to_hold_out(self) -> "DataConfig":
        """Check that captions are read where some of them are held out."""
        if self.held_out_captions and not self.captions:
            raise ValueError("data.held_out_captions needs data.captions=true; set it, or leave the words out")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PartitionConfig:
    """How the data set is divided into one cluster per expert."""

    num_experts: Annotated[int, Field(ge=1, le=1024)] = 4
    """K, the number of clusters and of experts."""

    by: Literal["features", "labels", "random"] = "features"
    """Criterion of the clusters; `data_partition/clustering/strategies.py` has one function for each."""

    features: Literal["pixels", "random_conv", "efficientnet_lite0", "transformers"] = "pixels"
    """Feature space of the clustering; `data_partition/features/extract.py` has one extractor for each."""

    features_path: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Folder, or repository of the Hub such as `facebook/dinov2-base`, of the network of `features=transformers`:
    DINOv2, DINOv3, SigLIP, CLIP and their kin."""

    components: Annotated[int, Field(ge=2)] = 64
    """Principal components of `pixels` features."""

    num_fine: Annotated[int, Field(ge=1)] = 1024
    """Maximum number of fine centroids; never more than a twentieth of the samples."""

    balanced: bool = True
    """Whether the fine centroids are merged into clusters of about equal size."""

    iterations: Annotated[int, Field(ge=1)] = 25
    """Iterations of k-means."""

    batch_size: Annotated[int, Field(ge=1)] = 256
    """Images per batch of feature extraction."""

    seed: Seed = 0
    """Two partitions with the same seed and data are equal."""

    @field_validator("features_path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Make the path of a folder absolute, so that a run may be resumed from another folder."""
        is_folder = path is not None and Path(path).expanduser().is_dir()
        return str(Path(path).expanduser().absolute()) if path is not None and is_folder else path

    @model_validator(mode="after")
    def _names_its_network(self) -> "PartitionConfig":
        """Check that a network has a path, and nothing else has one."""
        if (self.features == "transformers") != (self.features_path is not None):
            raise ValueError(
                "partition.features=transformers needs partition.features_path=…, a folder or a repository of the Hub, "
                f"and others have none; got features={self.features} with features_path={self.features_path}"
            )
        return self
