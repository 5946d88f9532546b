from pathlib import Path

import numpy as np
import pytest

from data_partition.datasets.image_folder import check_root, list_class_names, make_key, read_image_tree
from data_partition.datasets.source import Unreadable
from data_partition.errors import SourceMissing
from data_partition.shards.images import encode_png
from data_partition.shards.shards import Sample


def write(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.full((4, 4, 1), shade, dtype=np.uint8)))


def test_folders_are_classes_in_name_order(tmp_path: Path):
    for number, name in enumerate(["dogs/b.png", "cats/2.png", "cats/deep/1.png", "ants/x.png"]):
        write(tmp_path / name, number)
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    names = list_class_names(tmp_path)
    assert names == ("ants", "cats", "dogs")
    samples = [sample for sample in read_image_tree(tmp_path, names) if isinstance(sample, Sample)]
    assert [(sample.label, int(sample.image[0, 0, 0])) for sample in samples] == [(0, 3), (1, 1), (1, 2), (2, 0)]


def test_broken_image_is_unreadable_and_keeps_its_key(tmp_path: Path):
    write(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"no")
    bad, good = read_image_tree(tmp_path, ("a",))
    assert isinstance(good, Sample)
    assert isinstance(bad, Unreadable)
    assert bad.key == "a/bad%2Epng"


def test_links_outside_the_folder_are_not_followed(tmp_path: Path):
    write(tmp_path / "outside" / "secret.png")
    write(tmp_path / "root" / "a" / "x.png")
    (tmp_path / "root" / "a" / "y.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "outside")
    samples = list(read_image_tree(tmp_path / "root", list_class_names(tmp_path / "root")))
    assert [sample.key for sample in samples] == ["a/x%2Epng"]


def test_keys_are_distinct_and_have_no_dots():
    paths = ["a.b.png", "a_b.png", "a%2Eb.png", "a b,\n.png", "é.png"]
    keys = {make_key(Path(path)) for path in paths}
    assert len(keys) == len(paths)
    assert not any("." in key or "\n" in key for key in keys)


def test_missing_folder_raises(tmp_path: Path):
    for path in (None, str(tmp_path / "none")):
        with pytest.raises(SourceMissing, match="is not a folder"):
            check_root(path)
