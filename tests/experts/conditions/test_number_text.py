"""Captions that are numbers: near numbers are near, empty captions are null, and other texts are refused."""

import pytest
import torch

from benchmarks.arms.paper_networks import train_captioned
from benchmarks.arms.reward_rows import QUANTILES, draw_plane, label_all, sample_under
from experts.conditions.text_encoder import TextEncoder
from experts.conditions.text_files import TextError, read_text_shape
from experts.config import TextConfig

CONFIG = TextConfig(kind="number", length=2)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.from_config(CONFIG)


def test_numbers_have_their_own_encoding_alone_and_together(encoder, tmp_path):
    encoder.save(tmp_path)
    rows = encoder.encode(["1.5", "-2", "", "1.52"])
    assert rows.shape == encoder.null_text.shape == read_text_shape(CONFIG)
    assert torch.equal(rows.rows(slice(1, 2)).pooled, TextEncoder.load(tmp_path).encode([" -2.0 "]).pooled)
    assert rows.is_null.tolist() == [False, False, True, False] and not rows.pooled[2].any()
    near, far = (rows.pooled[0] - rows.pooled[3]).norm(), (rows.pooled[0] - rows.pooled[1]).norm()
    assert 0 < near < far / 4
    assert torch.equal(rows.sequence[:, 1], rows.pooled)


@pytest.mark.parametrize("caption", ["a boot", "nan", "inf", "1,5"])
def test_captions_that_are_no_numbers_are_refused(encoder, caption):
    with pytest.raises(TextError, match="captions that are finite numbers, and one is"):
        encoder.encode(["1", caption])


@pytest.mark.integration
def test_samples_follow_the_reward_they_are_asked_for(encoder, tmp_path):
    clean, plane, reward = draw_plane()
    values = label_all(clean, reward)
    expert = train_captioned(clean, [f"{value:.3f}" for value in values.tolist()], encoder, tmp_path)
    levels = [float(values.quantile(q)) for q in QUANTILES]
    means = [float((sample_under(expert, encoder, level) @ plane[:, 0]).mean()) for level in levels]
    assert means == sorted(means)
    assert means == pytest.approx(levels, abs=0.3)
