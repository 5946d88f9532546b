"""A survey counts what `build_dataset` finds, without decoding."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.datasets.survey import survey_source
from data_partition.errors import InvalidCaptions, NoSamples, OneClass, ShardError, SourceMissing
from data_partition.shards.images import encode_png
from ddm_core.artifacts import Workspace
from tests.data_partition.datasets.test_build import write_tree
from tests.data_partition.shards.test_tar import make_tar


@settings(max_examples=10, deadline=None)
@given(count=st.integers(8, 50), holdout=st.floats(0.3, 0.6), limit=st.none() | st.integers(1, 30))
def test_survey_image_folder_equals_build(tmp_path_factory, count: int, holdout: float, limit: int | None):
    folder = tmp_path_factory.mktemp("survey")
    tree = write_tree(folder / "in", count)
    config = DataConfig(source="image_folder", path=tree.path, image_size=4, holdout=holdout, limit=limit)
    survey = survey_source(config)
    if survey is None or not survey.train or not survey.held_out:
        return
    if sum(count > 0 for count in survey.class_counts.values()) == 1:
        with pytest.raises(OneClass):
            build_dataset(config, folder / "out", Workspace.at(folder / "scratch"))
        return
    built = build_dataset(config, folder / "out", Workspace.at(folder / "scratch"))
    assert (survey.train, survey.held_out) == (built.count, built.holdout_count)
    assert survey.class_counts == built.class_counts


def test_survey_digits_equals_build(tmp_path: Path, workspace: Workspace):
    config = DataConfig(source="digits", image_size=8, limit=150, holdout=0.25)
    built, survey = build_dataset(config, tmp_path / "out", workspace), survey_source(config)
    assert survey is not None and (survey.train, survey.held_out) == (built.count, built.holdout_count)


def test_survey_tar_counts_samples_and_missing_classes(tmp_path: Path):
    files = {f"{n:03d}.{end}": b"x" for n in range(20) for end in (("png", "cls") if n else ("png",))}
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(files | {"readme.md": b"x"}).getvalue())
    survey = survey_source(DataConfig(source="webdataset", path=str(path)))
    assert survey is not None and survey.train + survey.held_out == 20
    assert survey.unlabelled == ("00000-a/000",)


def test_survey_remote_tar_is_unknown():
    assert survey_source(DataConfig(source="webdataset", path="https://example.org/a.tar")) is None


def test_survey_folder_without_images_names_the_files(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NoSamples, match="1 with .txt"):
        survey_source(DataConfig(source="image_folder", path=str(tmp_path)))


def test_survey_missing_or_truncated_tar_names_it(tmp_path: Path):
    with pytest.raises(SourceMissing, match="1 of 2 tars"):
        (tmp_path / "0.tar").write_bytes(make_tar({"a.png": b"x"}).getvalue())
        survey_source(DataConfig(source="webdataset", path=f"{tmp_path}/{{0..1}}.tar"))
    (tmp_path / "1.tar").write_bytes(os.urandom(700))
    with pytest.raises(ShardError, match="1.tar"):
        survey_source(DataConfig(source="webdataset", path=f"{tmp_path}/{{0..1}}.tar"))


def tar_config(folder: Path, files: dict[str, bytes], **settings: object) -> DataConfig:
    (folder / "a.tar").write_bytes(make_tar(files).getvalue())
    return DataConfig(source="webdataset", path=str(folder / "a.tar"), image_size=4, fit="crop", **settings)


def test_tars_of_other_files_are_named_by_their_extensions(tmp_path: Path):
    config = tar_config(tmp_path, {f"{number}.{kind}": b"0" for number in range(3) for kind in ("npy", "cls")})
    with pytest.raises(NoSamples, match=r"has no image; its tars hold 3 with \.npy, 3 with \.cls; a sample is x\.png"):
        survey_source(config)


def test_tars_without_captions_are_refused_before_a_run(tmp_path: Path):
    files = {f"{number}.{kind}": b"0" for number in range(3) for kind in ("png", "cls")}
    with pytest.raises(InvalidCaptions, match=r"hold 3 with \.png, 3 with \.cls: captions are in \.txt"):
        survey_source(tar_config(tmp_path, files, captions=True))
    assert survey_source(tar_config(tmp_path, files | {"0.txt": b"a"}, captions=True)) is not None


def test_wrong_field_of_captions_is_named_with_others(tmp_path: Path, workspace: Workspace):
    image = encode_png(np.zeros((4, 4, 1), np.uint8))
    files = {f"{number}.{kind}": image for number in range(20) for kind in ("png",)}
    files |= {f"{number}.json": b'{"description": "a boot", "label": 1}' for number in range(20)}
    config = tar_config(tmp_path, dict(sorted(files.items())), captions=True, labels=False)
    message = (
        "in the field caption or text of .json: its first sample has .json, .png with the fields description, label"
    )
    with pytest.raises(InvalidCaptions, match=message):
        build_dataset(config, tmp_path / "out", workspace)
