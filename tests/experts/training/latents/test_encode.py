"""Encoding: order, reuse, damage, killed attempts, and latents that belong to their samples and to no others."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_partition.shards.shards import Sample, ShardWriter, read_samples
from ddm_core.artifacts import CACHE, Preempted, Workspace, list_files
from ddm_core.files.checksums import checksum
from experts.codec import PixelCodec
from experts.conditions.text_encoder import TextEncoder
from experts.conditions.text_files import TextError
from experts.config import TextConfig, TrainingConfig
from experts.training.latent_dataset import LatentError, draw_flips, make_batch
from experts.training.latents import shard_encoder
from experts.training.latents.caption_costs import caption_flops, text_flops
from experts.training.latents.divide import divide_latents
from experts.training.latents.encode import TEXT, encode_dataset
from experts.training.latents.folder import iter_blocks, read_class_names, read_latents
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.latents.training_set import encode_latents
from tests.text_encoders import save_tiny_encoder

SHAPE = (4, 4, 1)
WORDS = ("dark", "light", "ankle", "boot", "shirt", "one", "two")


def encode_pixels(folders, workspace):
    codec = PixelCodec(image_shape=SHAPE)
    folder = workspace.scratch / "codec"
    folder.mkdir(exist_ok=True)
    codec.save(folder)
    return encode_latents(folders, codec, folder, workspace)


def write_shards(folder, numbers, *, prefix="", captions=False):
    """Write images whose every pixel is their number, three to a shard."""
    writer = ShardWriter(folder, 3, class_names=("even", "odd"), image_shape=SHAPE)
    for number in numbers:
        caption = f"a {WORDS[number % 7]} {WORDS[number % 5]}" if captions and number % 4 else ""
        image = np.full(SHAPE, number, np.uint8)
        writer.add(Sample(key=f"{prefix}{number:03d}", image=image, label=number % 2, caption=caption))
    writer.close()
    return folder


def numbers_of(latents):
    return latents.clean[:, 0, 0, 0].add(1).mul(127.5).round().int().tolist()


@pytest.fixture
def dataset(tmp_path):
    write_shards(tmp_path / "dataset" / "train", range(20), captions=True)
    write_shards(tmp_path / "dataset" / "holdout", range(20, 25), captions=True)
    return tmp_path / "dataset"


@pytest.fixture
def codec_folder(tmp_path):
    (tmp_path / "codec").mkdir()
    PixelCodec(image_shape=SHAPE).save(tmp_path / "codec")
    return tmp_path / "codec"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder"), "transformers")
    return TextEncoder.from_config(TextConfig(kind="transformers", path=str(folder), length=5))


def frozen(codec_folder, stored_type=torch.float32):
    return FrozenCodec.open(codec_folder, PixelCodec(image_shape=SHAPE), stored_type=stored_type)


def contents(folder):
    return {str(path.relative_to(folder)): checksum(path) for path in list_files(folder)}


def test_latents_keep_order_class_and_cluster(shards, workspace):
    latents = encode_pixels([shards, shards], workspace)
    assert len(latents) == 80
    assert latents.latent_shape == (1, 4, 4)
    assert latents.class_id[:4].tolist() == [0, 1, 2, 0]
    assert latents.cluster_id.tolist() == [0] * 40 + [1] * 40
    assert torch.equal(latents.clean[:40], latents.clean[40:])


def test_latents_are_reencoded_for_other_shards_only(shards, workspace):
    encode_pixels([shards], workspace)
    written = workspace.scratch / CACHE / "latents" / "clean.bin"
    before = written.stat().st_mtime_ns
    encode_pixels([shards], workspace)
    assert written.stat().st_mtime_ns == before
    assert len(encode_pixels([shards, shards], workspace)) == 80


@pytest.mark.parametrize("part", ["latents", "parts/0/00001"])
@pytest.mark.parametrize("name", ["clean.bin", "class_id.bin", "cluster_id.bin", "latents.json"])
def test_damaged_latents_are_encoded_again(shards, workspace, caplog, part, name):
    first = encode_pixels([shards], workspace)
    expected = [tensor.clone() for tensor in (first.clean, first.class_id, first.cluster_id)]
    path = workspace.scratch / CACHE / part / name
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    again = encode_pixels([shards], workspace)
    assert all(map(torch.equal, expected, (again.clean, again.class_id, again.cluster_id)))
    assert "encoding again" in caplog.text


def test_empty_shards_are_refused(tmp_path, workspace):
    write_shards(tmp_path / "empty", [])
    with pytest.raises(LatentError, match="no samples"):
        encode_pixels([tmp_path / "empty"], workspace)


def test_blocks_are_all_samples_in_order(shards, workspace, monkeypatch):
    latents = encode_pixels([shards], workspace)
    monkeypatch.setattr("experts.training.latents.folder.BLOCK_BYTES", 4 * 16 * 7)
    blocks = list(iter_blocks(latents))
    assert [len(block) for block in blocks] == [7, 7, 7, 7, 7, 5]
    assert torch.equal(torch.cat([block.clean for block in blocks]), latents.clean)


def encode_and_divide(dataset, codec_folder, text, folder, clusters):
    workspace = Workspace.at(folder / "work")
    encode_dataset(dataset, frozen(codec_folder), text, folder / "latents", workspace)
    divide_latents(folder / "latents" / "train", clusters, folder / "divided")
    return [folder / "divided" / str(k) for k in range(len(clusters))]


def test_every_cluster_gets_its_own_samples_and_captions(dataset, codec_folder, text, tmp_path, workspace):
    groups = [[17, 2, 3, 11, 4], [], [0, 1, 19]]
    clusters = [write_shards(tmp_path / "clusters" / str(k), group, captions=True) for k, group in enumerate(groups)]
    folders = encode_and_divide(dataset, codec_folder, text, tmp_path, clusters)
    assert [numbers_of(read_latents(folder)) for folder in folders] == groups
    assert read_class_names(folders[1]) == ("even", "odd")
    assert TextEncoder.load(tmp_path / "latents" / TEXT).config == text.config
    samples, latents = list(read_samples(clusters[0])), read_latents(folders[0])
    expected = text.encode([sample.caption for sample in samples])
    found = latents.condition(torch.arange(5)).text
    torch.testing.assert_close(found.sequence, expected.sequence)
    torch.testing.assert_close(found.pooled, expected.pooled)
    assert torch.equal(found.mask, expected.mask) and found.is_null.tolist() == [False] * 4 + [True]
    torch.testing.assert_close(latents.null_text.sequence, text.null_text.sequence)
    joined = encode_latents([folders[0], folders[2]], PixelCodec(image_shape=SHAPE), codec_folder, workspace)
    assert joined.cluster_id.tolist() == [0] * 5 + [1] * 3
    assert joined.condition(torch.arange(8)).text.is_null.tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_each_caption_of_a_sample_is_drawn_by_its_frequency(codec_folder, text, tmp_path, workspace):
    for name in ("train", "holdout"):
        writer = ShardWriter(tmp_path / "dataset" / name, 3, image_shape=SHAPE)
        image, more = np.zeros(SHAPE, np.uint8), (("one two", 0.5), ("", 9.0), ("three", 1.5))
        writer.add(Sample(key="a", image=image, caption="a boot", more_captions=more))
        writer.add(Sample(key="b", image=image, more_captions=(("a shirt", 0.1),)))
        writer.add(Sample(key="c", image=image))
        writer.close()
    folders = encode_and_divide(tmp_path / "dataset", codec_folder, text, tmp_path, [tmp_path / "dataset" / "train"])
    latents, draws = read_latents(folders[0]), 2000
    captions = ["a boot", "one two", "three", "a shirt"]
    expected = text.encode(captions).pooled
    condition = latents.condition(torch.arange(2).repeat(draws), (torch.arange(2 * draws) + 0.5) / (2 * draws))
    found = (condition.text.pooled[:, None] - expected).abs().amax(-1).argmin(-1)
    shares = torch.bincount(found[::2], minlength=4) / draws
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5, 1.5, 0]) / 3, rtol=0, atol=0.01)
    assert (found[1::2] == 3).all() and not condition.text.is_null.any()
    assert latents.condition(torch.tensor([2])).text.is_null.all()


def test_latents_of_16_bits_are_trained_on_as_numbers_of_32(dataset, codec_folder, tmp_path, workspace):
    encode_dataset(dataset, frozen(codec_folder, torch.float16), None, tmp_path / "latents", workspace)
    divide_latents(tmp_path / "latents" / "train", [dataset / "train"], tmp_path / "divided")
    latents = encode_latents([tmp_path / "divided" / "0"], PixelCodec(image_shape=SHAPE), codec_folder, workspace)
    exact = encode_latents([dataset / "train"], PixelCodec(image_shape=SHAPE), codec_folder, workspace)
    assert latents.clean.dtype == torch.float16 and torch.equal(latents.clean, exact.clean.half())
    batch = make_batch(latents, TrainingConfig(batch_size=8), 0)
    assert batch.clean.dtype == torch.float32
    assert [notice.split(",")[0] for notice in workspace.notices] == ["25 samples"]


@pytest.mark.parametrize(("numbers", "prefix"), [([5, 6], "x"), ([5, 99], "")])
def test_renamed_or_other_samples_are_paired_with_nothing(dataset, codec_folder, tmp_path, numbers, prefix):
    clusters = [write_shards(tmp_path / "clusters" / "0", numbers, prefix=prefix, captions=True)]
    with pytest.raises(LatentError, match="has no latents"):
        encode_and_divide(dataset, codec_folder, None, tmp_path, clusters)


def test_changed_sample_of_the_same_name_is_paired_with_nothing(dataset, codec_folder, tmp_path):
    clusters = [write_shards(tmp_path / "clusters" / "0", [5, 6], captions=False)]
    with pytest.raises(LatentError, match="sample '005' of .* has no latents"):
        encode_and_divide(dataset, codec_folder, None, tmp_path, clusters)


def test_captions_may_be_kept_and_encoded_where_they_are_read(dataset, codec_folder, text, tmp_path, workspace):
    kept = replace(text, config=replace(text.config, stored_as="captions"))
    groups = [[17, 2, 3, 11, 4], [0, 1, 19]]
    clusters = [write_shards(tmp_path / "clusters" / str(k), group, captions=True) for k, group in enumerate(groups)]
    encoded = encode_and_divide(dataset, codec_folder, text, tmp_path / "encoded", clusters)
    folders = encode_and_divide(dataset, codec_folder, kept, tmp_path / "kept", clusters)
    assert read_latents(folders[0]).captions.texts() == [
        caption for sample in read_samples(clusters[0]) if (caption := sample.caption)
    ]
    for chosen in (slice(1), slice(2)):
        expected, found = (
            encode_latents(paths[chosen], PixelCodec(image_shape=SHAPE), codec_folder, Workspace.at(tmp_path / name))
            for name, paths in (("a", encoded), ("b", folders))
        )
        rows = torch.arange(len(expected))
        assert torch.equal(expected.clean, found.clean) and torch.equal(expected.cluster_id, found.cluster_id)
        ours, theirs = expected.condition(rows).text, found.condition(rows).text
        torch.testing.assert_close(ours.sequence, theirs.sequence, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=2e-3, atol=1e-3)
        assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.is_null, theirs.is_null)
        torch.testing.assert_close(expected.null_text.sequence, found.null_text.sequence)
    total = len(captions_of(dataset))
    assert encode_dataset(dataset, frozen(codec_folder), text, tmp_path / "once", workspace) == total * caption_flops(
        text
    )
    assert encode_dataset(dataset, frozen(codec_folder), kept, tmp_path / "again", workspace) == 0
    count = sum(len(read_latents(folder).captions.weight) for folder in folders)
    assert text_flops(folders) == count * caption_flops(text) and text_flops(encoded) == 0
    saved = 2 * sum(min(count, 5) * 8 + 8 for count in text.count_tokens(captions_of(dataset))) - len(
        "".join(captions_of(dataset))
    )
    assert f"saves {saved / 25 / 1024:.2f} KiB a sample" in workspace.notices[-1]


def captions_of(dataset):
    samples = [sample for name in ("train", "holdout") for sample in read_samples(dataset / name)]
    return [sample.caption for sample in samples if sample.caption]


def test_kept_captions_need_the_encoder_of_their_latents(dataset, codec_folder, tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", "transformers")
    text = TextEncoder.from_config(TextConfig(kind="transformers", path=str(folder), length=5, stored_as="captions"))
    latents = encode_and_divide(dataset, codec_folder, text, tmp_path, [dataset / "train"])
    save_tiny_encoder(folder, "clip")
    with pytest.raises(TextError, match="not the one of the training"):
        encode_latents(latents, PixelCodec(image_shape=SHAPE), codec_folder, Workspace.at(tmp_path / "island"))


def test_classes_may_be_left_to_scores(dataset, codec_folder, text, tmp_path, workspace):
    captions_only = replace(text, config=replace(text.config, classes=False))
    encode_dataset(dataset, frozen(codec_folder), captions_only, tmp_path / "out", workspace)
    part = tmp_path / "out" / "train" / "00000"
    assert (read_latents(part).class_id == -1).all()
    assert read_class_names(part) == ()


def test_latents_of_another_codec_are_refused(dataset, codec_folder, tmp_path, workspace):
    folders = encode_and_divide(dataset, codec_folder, None, tmp_path, [dataset / "train"])
    (codec_folder / "other.json").write_text("{}")
    with pytest.raises(LatentError, match="another codec"):
        encode_latents(folders, PixelCodec(image_shape=SHAPE), codec_folder, workspace)


def test_stopped_encoding_continues_with_the_next_shard(dataset, codec_folder, text, tmp_path, monkeypatch):
    encode_and_divide(dataset, codec_folder, text, tmp_path / "whole", [])
    calls = []
    monkeypatch.setattr(
        shard_encoder,
        "identify_sample",
        lambda sample, known=shard_encoder.identify_sample: calls.append(sample) or known(sample),
    )
    workspace, out = Workspace.at(tmp_path / "work"), tmp_path / "latents"
    arguments = (dataset, frozen(codec_folder), text, out)
    for number in range(3):
        stopping = iter([False] * (number + 1) + [True])
        stopped = Workspace(workspace.scratch, workspace.attempt, stopping=lambda stopping=stopping: next(stopping))
        with pytest.raises(Preempted, match="run the same command again"):
            encode_dataset(*arguments, stopped)
    encode_dataset(*arguments, workspace)
    assert contents(out) == contents(tmp_path / "whole" / "latents")
    assert len(calls) == 25, "no shard was encoded twice"


KILLED = """
import sys
from pathlib import Path
from ddm_core.artifacts import Workspace
from experts.codec import PixelCodec
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.latents.encode import encode_dataset
root = Path(sys.argv[1])
print("begin", flush=True)
codec = FrozenCodec.open(root / "codec", PixelCodec(image_shape=(4, 4, 1)))
encode_dataset(root / "dataset", codec, None, root / "latents", Workspace.at(root / "work"))
"""


@pytest.mark.slow
def test_killed_encoding_ends_with_the_same_bytes(dataset, codec_folder, tmp_path):
    encode_and_divide(dataset, codec_folder, None, tmp_path / "whole", [])
    parts = tmp_path / "work" / CACHE / "parts"
    for finished in (0, 2, 5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        while process.poll() is None and len(list(parts.glob("*/0*/latents.json"))) <= finished:
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in (tmp_path / "latents").glob("*"):
            os.rename(folder, tmp_path / f"half-{finished}-{folder.name}")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True)
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole" / "latents")


def test_mirrored_images_are_encoded_for_training_only(codec_folder, tmp_path, workspace):
    images = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), dtype=np.uint8)
    for name in ("train", "holdout"):
        writer = ShardWriter(tmp_path / "dataset" / name, 5, image_shape=SHAPE)
        for number, image in enumerate(images):
            writer.add(Sample(key=f"{number:03d}", image=image))
        writer.close()
    clusters = [tmp_path / "dataset" / "train"]
    encode_dataset(tmp_path / "dataset", frozen(codec_folder), None, tmp_path / "latents", workspace, flip=True)
    assert read_latents(tmp_path / "latents" / "holdout" / "00000").flipped is None
    divide_latents(tmp_path / "latents" / "train", clusters, tmp_path / "divided")
    latents = encode_latents([tmp_path / "divided" / "0"], PixelCodec(image_shape=SHAPE), codec_folder, workspace)
    assert torch.equal(latents.flipped, latents.clean.flip(-1))
    config = TrainingConfig(batch_size=7, seed=2)
    seen: dict[int, list[bool]] = {number: [] for number in range(12)}
    for step in range(48):  # 28 epochs
        for row in make_batch(latents, config, step).clean:
            number, is_flipped = (
                ((row == torch.stack([latents.clean, latents.flipped])).flatten(2).all(-1))
                .nonzero()[0]
                .flip(0)
                .tolist()
            )
            seen[number].append(bool(is_flipped))
    flips = torch.tensor(list(seen.values())).float()
    assert flips.shape == (12, 28) and 0.4 < flips.mean() < 0.6
    assert ((flips.mean(1) > 0) & (flips.mean(1) < 1)).all(), "each sample faces both ways"
    assert flips.mean(0).std() < 0.3 and torch.equal(
        draw_flips(torch.arange(12), torch.zeros(12).long(), 2), flips[:, 0].bool()
    )
