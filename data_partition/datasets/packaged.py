"""Data sets inside this package: garments, and emoji in two styles."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files

from data_partition.datasets.garment_captions import compose_caption
from data_partition.datasets.source import is_held_out
from data_partition.shards.shards import Sample, decode_sample
from data_partition.shards.tar import read_tar

FASHION = tuple(f"fashion/fashion-{number:04d}.tar.gz" for number in range(4))
EMOJI = ("emoji/emoji-noto.tar.gz", "emoji/emoji-twemoji.tar.gz")
EMOJI_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


def read_packaged_fashion(*, captions: bool) -> Iterator[Sample]:
    """Yield 8,000 garments of Fashion-MNIST, with captions composed from the pictures if asked for."""
    for sample in _read(FASHION):
        yield replace(sample, caption=compose_caption(sample.image, sample.label)) if captions else sample


def read_emoji(holdout: float, *, held_out: bool) -> Iterator[Sample]:
    """Yield emoji of 32 x 32 pixels, 1,906 in each of two styles; a caption names the emoji and its style.

    An emoji is held out in both styles or in none, as the hash of its number says.
    """
    for sample in _read(EMOJI):
        number, _, style = sample.key.rpartition("-")
        if is_held_out(number, holdout) == held_out:
            yield replace(sample, caption=f"{sample.caption}, {style} style")


def _read(names: tuple[str, ...]) -> Iterator[Sample]:
    for name in names:
        with files("data_partition").joinpath(name).open("rb") as file:
            for encoded in read_tar(file, name):
                yield decode_sample(encoded, name)
