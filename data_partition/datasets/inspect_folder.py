"""What lies in a folder of images: sizes, colours, classes, captions, bad files, duplicates."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_partition.datasets.captions import SIDECARS
from data_partition.datasets.image_folder import check_root, iter_image_files, list_class_names, read_image
from data_partition.datasets.survey import MAX_LISTED, describe_others
from data_partition.errors import SourceMissing, UnreadableImage
from data_partition.shards.images import SUFFIXES, Pixels, decode_image

MAX_DECODED = 400
"""Images that are decoded, evenly spaced over the folder."""

GREY_TOLERANCE = 2
"""Largest difference between the channels of a pixel that counts as grey."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """The contents of a folder; shares and sizes are those of the decoded images."""

    images: int
    decoded: int
    class_counts: dict[str, int]
    """Images in each folder directly below."""
    loose: int
    """Images in no such folder."""
    captions: int
    """Files of text that `data.captions=true` reads, named like the image beside them."""
    others: dict[str, int]
    """Files that are no image and no caption, by suffix."""
    sides: tuple[int, int, int]
    """Least, median and largest shorter side in pixels."""
    common_size: str
    """The most frequent size, such as `640x480`."""
    grey_share: float
    bad: dict[str, str]
    """Files that cannot be read, with the reason."""
    duplicates: tuple[tuple[str, str], ...]
    """Files with equal bytes, as pairs."""


def inspect_folder(path: str) -> FolderFacts:
    """Describe a folder of images in seconds; raises `SourceMissing` if it is not a folder or has no image."""
    root = check_root(path)
    paths = [image.relative_to(root) for image in islice(iter_image_files(root, root.resolve()), MAX_LISTED)]
    if not paths:
        raise SourceMissing(f"{root} has no image below it; {describe_others(root)}")
    counts = Counter(image.parts[0] if len(image.parts) > 1 else "" for image in paths)
    others, captions = _other_files(root, {str(image.with_suffix("")) for image in paths})
    sizes, greys, bad, digests = [], 0, {}, dict[str, list[str]]()
    for image in paths[:: -(-len(paths) // MAX_DECODED)]:
        try:
            data = read_image(root / image)
            pixels = decode_image(data)
        except (UnreadableImage, OSError) as error:
            bad[str(image)] = str(error)
            continue
        sizes.append((pixels.shape[1], pixels.shape[0]))
        greys += is_grey(pixels)
        digests.setdefault(hashlib.sha256(data).hexdigest(), []).append(str(image))
    short = sorted(min(size) for size in sizes) or [0]
    return FolderFacts(
        images=len(paths),
        decoded=len(sizes),
        class_counts={name: counts[name] for name in list_class_names(root)},
        loose=counts[""],
        captions=captions,
        others=others,
        sides=(short[0], short[len(short) // 2], short[-1]),
        common_size="x".join(map(str, Counter(sizes).most_common(1)[0][0])) if sizes else "",
        grey_share=greys / max(len(sizes), 1),
        bad=bad,
        duplicates=tuple((names[0], other) for names in digests.values() for other in names[1:]),
    )


def is_grey(pixels: Pixels) -> bool:
    """Return whether all channels of an image are about equal."""
    return pixels.shape[2] == 1 or int(np.ptp(pixels.astype(np.int16), axis=2).max()) <= GREY_TOLERANCE


def _other_files(root: Path, stems: set[str]) -> tuple[dict[str, int], int]:
    """Count the files that are no image by their suffix, and the captions of images."""
    others: Counter[str] = Counter()
    captions = 0
    for path in islice(_all_files(root), MAX_LISTED):
        relative = path.relative_to(root)
        if str(relative.with_suffix("")) in stems and path.suffix.lower() in SIDECARS:
            captions += 1
        elif path.suffix.lower() not in SUFFIXES:
            others[path.suffix.lower() or "no suffix"] += 1
    return dict(others.most_common()), captions


def _all_files(root: Path) -> Iterator[Path]:
    return (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
