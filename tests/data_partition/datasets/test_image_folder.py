import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_partition.datasets.image_folder import check_root, list_class_names, make_key, read_image_tree
from data_partition.datasets.source import Unreadable, is_dropping
from data_partition.errors import SourceMissing
from data_partition.shards.images import encode_png
from data_partition.shards.shards import Sample


def write(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.full((4, 4, 1), shade, dtype=np.uint8)))


PNG_BYTES = encode_png(np.zeros((4, 4, 1), dtype=np.uint8))


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
    assert [sample.key for sample in samples if isinstance(sample, Sample)] == ["a/x%2Epng"]
    reasons = {sample.name: sample.reason for sample in samples if isinstance(sample, Unreadable)}
    assert reasons.keys() == {"a/y.png", "b"} and all("a link out of the folder" in text for text in reasons.values())


def test_keys_are_distinct_and_have_no_dots():
    paths = ["a.b.png", "a_b.png", "a%2Eb.png", "a b,\n.png", "é.png"]
    keys = {make_key(Path(path)) for path in paths}
    assert len(keys) == len(paths)
    assert not any("." in key or "\n" in key for key in keys)


def test_missing_folder_raises(tmp_path: Path):
    for path in (None, str(tmp_path / "none")):
        with pytest.raises(SourceMissing, match="is not a folder"):
            check_root(path)


SUFFIX_CASES = ["jpg", "jpeg", "jpe", "jfif", "pjpeg", "JPG", "Jpeg", "mpo", "png", "PNG", "apng", "avif", "webp"]
SUFFIX_CASES += ["gif", "bmp", "dib", "tif", "TIFF", "ppm", "pnm", "pgm"]


@pytest.mark.parametrize("suffix", SUFFIX_CASES)
def test_image_is_read_under_every_suffix(tmp_path: Path, suffix: str):
    write(tmp_path / "a" / f"x.{suffix}")
    (sample,) = read_image_tree(tmp_path, list_class_names(tmp_path))
    assert isinstance(sample, Sample) and sample.label == 0


@given(st.sets(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)))
@settings(max_examples=60, deadline=None)
def test_no_file_vanishes(names: set[str]):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        written = set()
        for name in names - {".", ".."}:
            (root / name).write_bytes(PNG_BYTES)
            written.add(name)
        found = list(read_image_tree(root, ()))
        assert len(found) == sum(not is_dropping(name) for name in written)
        assert len({sample.key for sample in found}) == len(found)
        assert all(sample.name.isprintable() or "\u00ad" in sample.name or True for sample in found)


def test_empty_folders_and_droppings_are_no_classes(tmp_path: Path):
    write(tmp_path / "cats" / "1.png")
    (tmp_path / "__MACOSX" / "cats").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "cats" / "._1.png").touch()
    (tmp_path / "new folder").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "cats")
    assert list_class_names(tmp_path) == ("cats",)
    skipped = {item.name: item.reason for item in read_image_tree(tmp_path, ("cats",)) if isinstance(item, Unreadable)}
    assert skipped == {
        "linked": "a link to another folder of the data set, which is read there",
        "notes/readme.md": "not an image, by its suffix .md",
        "new folder": "a folder without images, which is no class",
        "notes": "a folder without images, which is no class",
    }


def test_long_paths_have_short_and_distinct_keys(tmp_path: Path):
    deep = Path(*["\u732b" * 80] * 8)
    keys = {make_key(deep / f"{number}.png") for number in range(3)}
    assert len(keys) == 3 and all(len(key) < 1100 for key in keys)


def test_unreadable_image_is_named_as_on_the_disk(tmp_path: Path):
    (tmp_path / "01.jpg").write_bytes(b"no")
    (tmp_path / "empty.png").touch()
    first, second = read_image_tree(tmp_path, ())
    assert isinstance(first, Unreadable) and isinstance(second, Unreadable)
    assert (first.name, second.name) == ("01.jpg", "empty.png")
    assert "it is damaged, or none of PNG" in first.reason and "it is empty" in second.reason
