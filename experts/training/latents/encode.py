"""Encode the shards of a data set once, each into a folder of its own.

An attempt continues with the shards that earlier ones have finished.
"""

import math
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CACHE, Preempted, Workspace
from ddm_core.files.links import link_or_copy
from experts.conditions.text_encoder import TextEncoder
from experts.training.latents.caption_costs import caption_flops, count_captions
from experts.training.latents.folder import read_record
from experts.training.latents.shard_encoder import FrozenCodec, OpenModels, ShardEncoder, encoded_bytes, part_folder
from experts.training.parallel.distributed import DataParallelGroup

TEXT = "text"
"""Folder that names the text encoder beside the latents of a data set."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Folders of shards that are encoded one after the other, and how many of how many samples are done."""

    open_models: OpenModels
    workspace: Workspace
    total: int
    group: DataParallelGroup = DataParallelGroup()
    """Workers that encode together, each its share of the shards."""
    done: list[int] = field(default_factory=list)

    def encode_shards(self, shards: Path, out: Path, *, flip: bool = False, stores_latents: bool = True) -> list[Path]:
        """Encode every shard of a folder into a folder below `out`, unless it is there; raises `Preempted`.

        With `flip` the mirrored images are encoded too. A worker of a group leaves the shards of the others to them.
        """
        numbers = range(len(read_index(shards).shards))
        start = partial(ShardEncoder.start, self.open_models, shards, out, flip, stores_latents)
        ours = numbers[self.group.rank :: self.group.size]
        with closing(self.workspace.engine.map(start, ours)) as counts:
            for count in counts:
                self.done.append(count)
                all_done = min(sum(self.done) * self.group.size, self.total)
                self.workspace.report_progress(all_done, self.total, unit="images encoded")
                if self.workspace.stop_requested():
                    done = f"{sum(self.done)} of {self.total}"
                    raise Preempted(f"stopped after {done} images; run the same command again to continue")
        return [part_folder(out, number) for number in numbers]


def encode_dataset(
    dataset: Path,
    codec: FrozenCodec,
    text: TextEncoder | None,
    out: Path,
    workspace: Workspace,
    *,
    flip: bool = False,
    stores_latents: bool = True,
    open_models: OpenModels | None = None,
) -> float:
    """Encode the training and the held-out samples of a data set into `out/train` and `out/holdout`.

    With `flip` the training samples are encoded mirrored too; without `stores_latents` only captions are.
    Returns the FLOPs of the text encoder, in all attempts.
    Says before it starts how much they will take, and afterwards how many captions were cut. Raises `Preempted`; the
    next attempt continues with the shards that are not finished. Workers of a group divide the shards, and rank 0
    writes `out`. Other processes of the workspace's engine load codec and text encoder with `open_models`.
    """
    total, group = sum(read_index(dataset / name).count for name in ("train", "holdout")), DataParallelGroup.join()
    encoding = Encoding(
        open_models=open_models or (lambda: (codec, text)), workspace=workspace, total=total, group=group
    )
    size = _sample_bytes(codec, text, copies=(1 + flip) * stores_latents)
    if group.is_main:
        workspace.notify(
            f"{total:,} samples, at most {size / 2**10:.2f} KiB of latents each, {total * size / 2**20:.1f} MiB in all"
        )
    with group.worker_loss_as_error():
        parts = _encode_both(encoding, dataset, flip=flip, stores_latents=stores_latents)
    if not group.is_main:
        return 0.0
    for part in parts:
        shutil.copytree(part, out / part.parent.name / part.name, copy_function=link_or_copy)
    if text is not None:
        (out / TEXT).mkdir()
        text.save(out / TEXT)
    counts = sum((Counter(read_record(part).get("counts", {})) for part in parts), Counter[str]())
    if num_cut := counts["cut"]:
        workspace.notify(
            f"{num_cut:,} captions, in {total:,} samples, are longer than text.length={text and text.config.length} "
            "tokens, and were cut"
        )
    if saved := counts["saved"]:
        workspace.notify(
            f"captions are kept as text, which saves {saved / total / 2**10:.2f} KiB a sample; every "
            "stage that trains on them encodes them"
        )
    return caption_flops(text) * sum(count_captions(part, as_text=False) for part in parts) if text else 0.0


def _encode_both(encoding: Encoding, dataset: Path, *, flip: bool, stores_latents: bool) -> list[Path]:
    """Encode training and held-out samples, wait for the other workers of the group, and return all folders."""
    parts, notice = [], None
    try:
        for name in ("train", "holdout"):
            folder = encoding.workspace.scratch / CACHE / "parts" / name
            is_flipped = flip and name == "train"
            parts += encoding.encode_shards(dataset / name, folder, flip=is_flipped, stores_latents=stores_latents)
    except Preempted as error:
        notice = error
    if encoding.group.any_rank(notice is not None):
        raise notice or Preempted("another worker was stopped; run the same command again to continue")
    return parts


def encode_folder(shards: Path, codec: FrozenCodec, text: TextEncoder | None, out: Path, workspace: Workspace) -> int:
    """Encode a folder of shards into folders below `out`, and return the number of samples; raises `Preempted`."""
    total = read_index(shards).count
    encoding = Encoding(open_models=lambda: (codec, text), workspace=workspace, total=total)
    for part in encoding.encode_shards(shards, workspace.scratch / CACHE / "parts" / out.name):
        shutil.copytree(part, out / part.name, copy_function=link_or_copy)
    return total


def _sample_bytes(codec: FrozenCodec, text: TextEncoder | None, copies: int) -> int:
    """Return the most bytes that one sample takes: latents, class, cluster, hash, and a text of full length."""
    latents = copies * codec.stored_type.itemsize * math.prod(codec.codec.latent_shape) + 24
    if text is None:
        return latents
    if text.config.stored_as == "captions":
        return latents
    return latents + encoded_bytes(text, [text.config.length]) + 20
