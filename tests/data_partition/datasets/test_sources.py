from collections import Counter
from importlib.resources import files
from typing import get_args, get_type_hints

import pytest

from data_partition.config import DataConfig
from data_partition.datasets.fashion_mnist import DEBIAN_FOLDER
from data_partition.datasets.sources import SOURCES
from data_partition.shards.shards import Sample


def test_every_config_name_has_a_source():
    assert set(SOURCES) == set(get_args(get_type_hints(DataConfig)["source"]))


@pytest.mark.slow
def test_packaged_fashion_has_8000_images_in_ten_equal_classes():
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


def test_license_is_packaged_with_the_images():
    text = (files("data_partition") / "fashion" / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "MIT License" in text
    assert "Zalando SE" in text


def test_digits_use_the_full_pixel_range():
    samples = [sample for sample in SOURCES["digits"](DataConfig()).train() if isinstance(sample, Sample)]
    assert len(samples) == 1797
    assert (min(sample.image.min() for sample in samples), max(sample.image.max() for sample in samples)) == (0, 255)


@pytest.mark.integration
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_full_fashion_holds_out_half_of_its_test_images():
    source = SOURCES["fashion_full"](DataConfig(source="fashion_full"))
    assert source.test is not None
    assert [sample.key for sample in source.test()] == [f"t10k-{row:05d}" for row in range(5000)]
    packaged = {sample.key: sample.image.tobytes() for sample in SOURCES["fashion"](DataConfig()).train()}
    rows = {sample.key: sample.image.tobytes() for sample in source.train()}
    assert len(rows) == 60_000
    assert packaged.items() <= rows.items()
