"""Parquet files as Hugging Face saves them: bytes, captions, classes as words, and files that hold no images."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.datasets.survey import survey_source
from data_partition.errors import InvalidCaptions, ShardError, SourceMissing, TooManyUnreadable
from data_partition.shards.shards import read_samples
from ddm_core.artifacts import Workspace


def encode(number):
    data = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), number, np.uint8)).save(data, "PNG")
    return data.getvalue()


def write_table(folder, name, numbers, **columns):
    folder.mkdir(exist_ok=True)
    images = [{"bytes": encode(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table({"image": images} | columns)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    if isinstance(columns.get("label", [""])[0], int):
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, folder / name)


def config_of(path, **changes):
    settings = {"image_size": 6, "channels": 3, "holdout": 0.3, "captions": True, "labels": False}
    return DataConfig(source="parquet", path=str(path), **settings | changes)


def build(config, tmp_path):
    summary = build_dataset(config, tmp_path / "out", workspace := Workspace.at(tmp_path / "work"))
    parts = [sample for part in ("train", "holdout") for sample in read_samples(tmp_path / "out" / part)]
    return summary, {int(sample.image[0, 0, 0]): sample for sample in parts}, workspace


def test_saved_data_set_is_read(tmp_path):
    words = [f"picture {number}" if number % 5 else None for number in range(30)]
    write_table(tmp_path / "data", "train-00000-of-00002.parquet", range(20), text=words[:20], label=[0, 1] * 10)
    write_table(tmp_path / "data", "train-00001-of-00002.parquet", range(20, 30), text=words[20:], label=[0, 1] * 5)
    config = config_of(tmp_path / "data", labels=True)
    summary, samples, workspace = build(config, tmp_path)
    assert sorted(samples) == list(range(30))
    assert [samples[number].caption for number in range(30)] == [word or "" for word in words]
    assert [samples[number].label for number in range(30)] == [0, 1] * 15
    assert summary.class_names == ("cat", "dog")
    assert any("6 read: no caption, so the null text" in notice for notice in workspace.notices)
    survey = survey_source(config)
    assert (survey.train, survey.held_out) == (summary.count, summary.holdout_count)


def test_words_are_classes_and_any_column_is_a_caption(tmp_path):
    write_table(tmp_path / "data", "a.parquet", range(20), label=["sad", "happy"] * 10, prompt=["smile"] * 20)
    config = config_of(tmp_path / "data" / "a.parquet", labels=True, caption_key="prompt")
    summary, samples, _ = build(config, tmp_path)
    assert set(summary.class_counts) == {"sad", "happy"} and samples[3].caption == "smile"


def test_file_without_image_bytes_is_one_error(tmp_path):
    parquet.write_table(pa.table({"url": ["http://x"], "text": ["a"]}), tmp_path / "a.parquet")
    for read in (survey_source, lambda config: build(config, tmp_path)):
        with pytest.raises(SourceMissing, match=r"no column with the bytes of images; it has url \(string\), text"):
            read(config_of(tmp_path))


def test_paths_instead_of_bytes_are_named(tmp_path):
    images = pa.array([{"bytes": None, "path": "a.png"}] * 9, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    parquet.write_table(pa.table({"image": images, "text": ["a"] * 9}), tmp_path / "a.parquet")
    with pytest.raises(TooManyUnreadable, match="it has no bytes of an image"):
        build(config_of(tmp_path), tmp_path)


def test_damaged_file_is_one_error(tmp_path):
    write_table(tmp_path / "data", "a.parquet", range(20), text=["a"] * 20)
    file = tmp_path / "data" / "a.parquet"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match="not a readable Parquet file"):
        build(config_of(tmp_path / "data"), tmp_path)


def test_no_caption_at_all_is_one_error(tmp_path):
    write_table(tmp_path / "data", "a.parquet", range(20))
    with pytest.raises(InvalidCaptions, match="none of 20 images has a caption"):
        build(config_of(tmp_path / "data"), tmp_path)
    for key, wanted in ((None, "caption or text"), ("prompt", "prompt")):
        with pytest.raises(InvalidCaptions, match=f"have no column {wanted}; they have .*: name one with"):
            survey_source(config_of(tmp_path / "data", caption_key=key))


def test_missing_path_is_one_error(tmp_path):
    with pytest.raises(SourceMissing, match="is no Parquet file"):
        build(config_of(tmp_path / "nothing"), tmp_path)
