from collections import Counter
from importlib.resources import files
from typing import get_args, get_type_hints

import pytest

from data_partition.config import DataConfig
from data_partition.datasets.fashion_mnist import DEBIAN_FOLDER
from data_partition.datasets.sources import SOURCES
from data_partition.shards.shards import Sample


def test_every_name_of_the_config_has_a_source():
    assert set(SOURCES) == set(get_args(get_type_hints(DataConfig)["source"]))


@pytest.mark.slow
def test_packaged_fashion_is_8000_images_of_ten_equal_classes():
    source = SOURCES["fashion"](DataConfig())
    labels, keys = Counter[int](), set[str]()
    for sample in source.train():
        assert isinstance(sample, Sample)
        assert sample.image.shape == (28, 28, 1)
        labels[sample.label] += 1
        keys.add(sample.key)
    assert labels == dict.fromkeys(range(10), 800)
    assert len(keys) == 8000
    assert source.class_names[9] == "Ankle boot"


def test_the_licence_travels_with_the_images():
    text = (files("data_partition") / "fashion" / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "MIT License" in text
    assert "Zalando SE" in text


def test_digits_use_the_whole_range():
    samples = [each for each in SOURCES["digits"](DataConfig()).train() if isinstance(each, Sample)]
    assert len(samples) == 1797
    assert (min(each.image.min() for each in samples), max(each.image.max() for each in samples)) == (0, 255)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_all_of_fashion_holds_out_half_of_its_test_images():
    source = SOURCES["fashion_full"](DataConfig(source="fashion_full"))
    assert source.test is not None
    assert [each.key for each in source.test()] == [f"t10k-{row:05d}" for row in range(5000)]
    packaged = {each.key: each.image.tobytes() for each in SOURCES["fashion"](DataConfig()).train()}
    rows = {each.key: each.image.tobytes() for each in source.train()}
    assert len(rows) == 60_000
    assert packaged.items() <= rows.items()
