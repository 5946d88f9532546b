from collections import Counter
from importlib.resources import files
from itertools import islice

import numpy as np
import pytest

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.datasets.captions import has_held_out_words
from data_partition.datasets.garment_captions import KINDS, compose_caption
from data_partition.datasets.sources import SOURCES
from data_partition.datasets.survey import survey_source
from data_partition.shards.shards import read_batches
from ddm_core.artifacts import Workspace


def garment(value, height, width):
    image = np.zeros((28, 28, 1), np.uint8)
    image[:height, :width] = value
    return image


@pytest.mark.parametrize(
    ("value", "height", "width", "caption"),
    [
        (60, 10, 20, "a dark wide ankle boot"),
        (220, 20, 20, "a light tall ankle boot"),
        (150, 15, 20, "an ankle boot"),
        (0, 0, 0, "an ankle boot"),
    ],
)
def test_a_caption_says_what_is_measured(value, height, width, caption):
    assert compose_caption(garment(value, height, width), KINDS.index("ankle boot")) == caption


def test_most_garments_have_a_tone_or_a_shape():
    captions = [sample.caption for sample in islice(SOURCES["fashion"](DataConfig(captions=True)).train(), 800)]
    words = Counter(word for caption in captions for word in caption.split())
    assert all(150 < words[word] < 400 for word in ("dark", "light", "tall", "wide"))
    assert all(any(kind in caption for kind in KINDS) for caption in captions)


def test_an_emoji_is_held_out_in_both_styles_or_in_none():
    config = DataConfig(source="emoji", image_size=32, channels=3, captions=True)
    source = SOURCES["emoji"](config)
    train, held_out = ([sample.key for sample in read()] for read in (source.train, source.test))
    numbers = [{key.rpartition("-")[0] for key in keys} for keys in (train, held_out)]
    assert len(train) + len(held_out) == 3812
    assert not numbers[0] & numbers[1]
    assert len(numbers[1]) * 2 == len(held_out)
    survey = survey_source(config)
    assert (survey.train, survey.held_out) == (len(train), len(held_out))


def test_the_licenses_of_the_emoji_are_packaged():
    text = (files("data_partition") / "emoji" / "LICENSE.emoji").read_text(encoding="utf-8")
    assert all(word in text for word in ("Apache License 2.0", "CC BY 4.0", "Google", "Twitter"))


@pytest.mark.parametrize(
    ("caption", "is_held_out"),
    [("a dark wide bag", True), ("a Dark bag", True), ("a light bag", False), ("a dark wide coat", False)],
)
def test_captions_with_all_words_of_an_entry_are_held_out(caption, is_held_out):
    assert has_held_out_words(caption, ("dark bag", "light shoe")) is is_held_out


def test_held_out_combinations_are_never_trained_on(tmp_path):
    config = DataConfig(captions=True, held_out_captions=("dark bag",), limit=600)
    build_dataset(config, tmp_path, Workspace.at(tmp_path / "scratch"))
    captions = {
        part: [caption for batch in read_batches(tmp_path / part, 512) for caption in batch.captions]
        for part in ("train", "holdout")
    }
    assert not [caption for caption in captions["train"] if has_held_out_words(caption, ("dark bag",))]
    assert [caption for caption in captions["holdout"] if has_held_out_words(caption, ("dark bag",))]
    assert [caption for caption in captions["train"] if has_held_out_words(caption, ("light bag",))]
