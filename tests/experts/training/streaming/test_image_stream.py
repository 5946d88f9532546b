"""Training from tars of the user: the same samples whatever reads them, a bounded cache, errors that name the fault."""

import itertools
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.testbed.range_server import serve_ranges
from data_partition.datasets.build import build_dataset
from data_partition.errors import CacheFull, ShardChanged, ShardError, SourceUnreachable
from data_partition.shards import urls
from data_partition.shards.range_cache import RangeCache
from data_partition.shards.shards import open_offsets, read_samples
from ddm_core.artifacts import Preempted, Workspace
from experts.codec import PixelCodec
from experts.config import TrainingConfig
from experts.training.latent_dataset import Batch, LatentDataset, LatentError, make_batch
from experts.training.latents.divide import divide_latents
from experts.training.latents.encode import encode_dataset
from experts.training.latents.folder import has_latents, read_latents
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.latents.training_set import encode_latents
from experts.training.streaming.image_stream import ImageStream
from experts.training.trainer import fit
from tests.data_partition.shards.test_offset_index import SIDE, stream_config, write_tars

CODEC = PixelCodec(image_shape=(SIDE, SIDE, 3))
TRAINING = TrainingConfig(steps=9, batch_size=16, shuffle_shards=2, log_every=3, checkpoint_every=4, warmup_steps=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six tars whose latents are not stored, divided into two clusters."""
    root = tmp_path_factory.mktemp("stream")
    config = replace(stream_config(write_tars(root / "tars", (12,) * 6)), labels=False, captions=False)
    build_dataset(config, root / "dataset", Workspace.at(root / "work"))
    (root / "codec").mkdir()
    CODEC.save(root / "codec")
    frozen = FrozenCodec.open(root / "codec", CODEC)
    for name, stores in (("latents", False), ("stored", True)):
        work = Workspace.at(root / f"work_{name}")
        encode_dataset(root / "dataset", frozen, None, root / name, work, flip=True, stores_latents=stores)
        divide_latents(root / name / "train", [root / "dataset" / "train"], root / f"divided_{name}")
    return root


def open_samples(root: Path, folder: Path, name: str = "latents") -> LatentDataset:
    return encode_latents([root / f"divided_{name}" / "0"], CODEC, root / "codec", Workspace.at(folder))


def draw(dataset: LatentDataset, config: TrainingConfig, cache: Path, steps: range) -> list[Batch]:
    with dataset.reading(config, cache):
        return [make_batch(dataset, config, step) for step in steps]


def test_nothing_but_conditions_is_stored(root, tmp_path):
    dataset = open_samples(root, tmp_path)
    assert dataset.clean.numel() == 0
    assert dataset.latent_shape == (3, SIDE, SIDE)
    stored = sum(path.stat().st_size for path in (root / "latents").rglob("clean.bin"))
    assert stored == 0
    assert not list((root / "latents").rglob("images"))


def test_latents_equal_those_that_are_stored(root, tmp_path):
    streamed, stored = open_samples(root, tmp_path / "a"), open_samples(root, tmp_path / "b", "stored")
    rows, is_flipped = torch.tensor([0, 30, 7, 7]), torch.tensor([False, True, False, True])
    assert torch.equal(streamed.clean_rows(rows, is_flipped), stored.clean_rows(rows, is_flipped))
    chosen, expected = streamed.select(rows), stored.select(rows)
    assert torch.equal(chosen.clean, expected.clean)
    assert torch.equal(chosen.flipped, expected.flipped)
    assert torch.equal(chosen.sample_id, expected.sample_id)


def test_latents_are_divided_again_after_a_stop(root, tmp_path):
    for _ in range(2):
        divide_latents(root / "latents" / "train", [root / "dataset" / "train"], tmp_path)
    assert len(open_offsets(tmp_path / "0" / "images")[0].rows) == len(read_latents(tmp_path / "0"))


def test_batches_do_not_depend_on_threads_or_cache(root, tmp_path):
    dataset = open_samples(root, tmp_path)
    whole = draw(dataset, TRAINING, tmp_path / "none", range(9))
    for number, (readers, cache_gb) in enumerate(itertools.product((1, 7), (None, 1e-3))):
        config, start = replace(TRAINING, readers=readers, cache_gb=cache_gb), 3 * number % 8
        drawn = draw(dataset, config, tmp_path / str(number), range(start, 9))
        assert all(torch.equal(a.clean, b.clean) for a, b in zip(drawn, whole[start:], strict=True))
    clean = torch.cat([batch.clean for batch in whole])
    images = torch.cat([CODEC.encode(sample.image[None]) for sample in read_samples(root / "dataset" / "train")])
    first_epoch = torch.cat([clean[: len(dataset)], clean[: len(dataset)].flip(-1)])
    assert all((first_epoch == image).flatten(1).all(1).any() for image in images)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, 4)

    def forward(self, batch: Batch) -> torch.Tensor:
        return (self.layer(batch.clean.flatten(1)) - batch.t[:, None]).square().mean()


def train(dataset: LatentDataset, config: TrainingConfig, workspace: Workspace) -> torch.Tensor:
    torch.manual_seed(0)
    return fit(Linear(), lambda model, batch: model(batch), dataset, config, workspace).model.layer.weight


def test_resumed_training_with_other_readers_has_the_same_bits(root, tmp_path):
    expected = train(open_samples(root, tmp_path / "a"), TRAINING, Workspace.at(tmp_path / "whole"))
    calls = itertools.count()
    stopped = replace(Workspace.at(tmp_path / "resumed"), stopping=lambda: next(calls) >= 5)
    config = replace(TRAINING, readers=1, cache_gb=1e-3)
    with pytest.raises(Preempted):
        train(open_samples(root, tmp_path / "b"), config, stopped)
    config = replace(TRAINING, readers=3)
    resumed = train(open_samples(root, tmp_path / "b"), config, replace(stopped, stopping=lambda: False))
    assert torch.equal(resumed, expected)


def test_joined_folders_are_one_order_of_tars(root, tmp_path):
    folder, rows = root / "divided_latents" / "0" / "images", np.arange(5)
    single, double = ImageStream(CODEC, [folder]), ImageStream(CODEC, [folder, folder])
    assert double.counts == tuple(2 * count for count in single.counts)
    count = sum(single.counts)
    drawn = double.batch_rows(replace(TRAINING, batch_size=2 * count), 0)
    assert sorted(drawn.tolist()) == list(range(2 * count))
    assert torch.equal(double.latents(torch.from_numpy(rows + count)), single.latents(torch.from_numpy(rows)))


def test_latents_that_are_stored_and_not_cannot_be_joined(root, tmp_path):
    folders = [root / name / "0" for name in ("divided_latents", "divided_stored")]
    assert all(map(has_latents, folders))
    with pytest.raises(LatentError, match="encode all of them in one way"):
        encode_latents(folders, CODEC, root / "codec", Workspace.at(tmp_path))
    assert len(read_latents(folders[0])) == len(read_latents(folders[1]))


def test_cache_keeps_its_bound_and_what_was_used_last(root, tmp_path):
    index, _ = open_offsets(root / "divided_latents" / "0" / "images")
    sizes = [int(index.sizes(index.rows_of(tar)).sum()) for tar in range(len(index.tars))]
    with RangeCache(tmp_path, 2 * max(sizes)) as cache:
        (tmp_path / ".partial-dead").touch()
        for tar in (0, 1, 0, 2, 0):
            cache.read(index, index.rows_of(tar)[-1])
            assert cache.num_bytes <= cache.max_bytes
        kept = {path.name for path in tmp_path.iterdir()} - {".partial-dead"}
    assert kept == {index.checksums[tar][:32] for tar in (0, 2)}
    with RangeCache(tmp_path, 2 * max(sizes)) as cache:
        assert not (tmp_path / ".partial-dead").exists()
        assert cache.num_bytes == sizes[0] + sizes[2]


def test_damaged_cache_is_read_again(root, tmp_path):
    index, _ = open_offsets(root / "divided_latents" / "0" / "images")
    with RangeCache(tmp_path, 10**6) as cache:
        cache.fetch(index, 0).result()
        part = next(tmp_path.iterdir())
        part.write_bytes(bytes(part.stat().st_size // 2))
        assert [cache.read(index, row) for row in index.rows_of(0)] == [index.read(row) for row in index.rows_of(0)]


def test_cache_on_a_full_disk_is_one_error(root, tmp_path):
    index, _ = open_offsets(root / "divided_latents" / "0" / "images")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            RangeCache(tmp_path, 10**6) as cache,
            pytest.raises(CacheFull, match="cannot be written .* free some space"),
        ):
            cache.read(index, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_cache_without_room_for_two_blocks_is_refused(root, tmp_path):
    dataset = open_samples(root, tmp_path)
    with (
        pytest.raises(
            CacheFull, match=r"training.cache_gb=1e-06 has no room for 2 blocks of training.shuffle_shards=2"
        ),
        dataset.reading(replace(TRAINING, cache_gb=1e-6), tmp_path / "cache"),
    ):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stream from a server: (its behavior, the data set's folder)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urls, "RETRY_AFTER_S", (0.0, 0.0))
    write_tars(tmp_path / "tars", (12, 12))
    with serve_ranges(tmp_path / "tars") as (address, behavior):
        config = replace(stream_config(f"{address}/{{0,1}}.tar"), labels=False, captions=False)
        build_dataset(config, tmp_path / "dataset", Workspace.at(tmp_path / "work"))
        behavior.requests.clear()
        yield behavior, tmp_path / "dataset" / "train"


@pytest.mark.parametrize("failures", [["503", "cut"], ["cut", "cut"], ["429", "500"]])
def test_server_that_fails_is_asked_again(server, failures):
    behavior, folder = server
    stream = ImageStream(CODEC, [folder])
    expected = stream.latents(torch.arange(3))
    behavior.requests.clear()
    behavior.failures.extend(failures)
    assert torch.equal(stream.latents(torch.arange(3)), expected)
    assert len(behavior.requests) == 3 + len(failures)


def test_server_that_stays_down_is_one_error(server):
    behavior, folder = server
    behavior.failures.extend(["503"] * 100)
    with pytest.raises(SourceUnreachable, match=r"0\.tar: HTTP 503"):
        ImageStream(CODEC, [folder]).latents(torch.arange(1))


def test_server_that_drips_is_given_up(server, monkeypatch):
    _, folder = server
    monkeypatch.setattr(urls, "MAX_RANGE_S", -1.0)
    with pytest.raises(SourceUnreachable, match="the server is too slow"):
        ImageStream(CODEC, [folder]).latents(torch.arange(1))


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_file_that_changed_on_a_server_is_named(server, change, tmp_path):
    tar = tmp_path / "tars" / "0.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:1000] if change == "cut" else content[::-1])
    with pytest.raises(ShardChanged, match="bytes, and had" if change == "cut" else "has the tag .* and had"):
        ImageStream(CODEC, [server[1]]).latents(torch.arange(8))


def test_server_without_ranges_is_refused(server, tmp_path):
    behavior, folder = server
    behavior.has_ranges = False
    with pytest.raises(ShardError, match="sends no ranges of bytes"):
        ImageStream(CODEC, [folder]).latents(torch.arange(1))


def test_a_block_is_read_by_few_requests(server, tmp_path):
    behavior, folder = server
    stream = ImageStream(CODEC, [folder])
    config = replace(TRAINING, batch_size=4, cache_gb=1.0)
    with stream.reading(config, tmp_path / "cache"):
        for step in range(12):
            stream.latents(stream.batch_rows(config, step))
    assert len(behavior.requests) == 2
