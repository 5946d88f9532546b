"""Images from a pipeline folder, batch by batch, kept between two attempts.

Image i depends on seed i alone, so the same seeds of two pipelines start from the same noise, and their
grids can be looked at side by side.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.numpy import load_file

from ddm_core.artifacts import Preempted, Workspace, checksum, files_in, fingerprint, save_arrays
from ensemble.config import SamplingConfig
from ensemble.ensemble import ExpertModel
from ensemble.membership import missing_warning
from ensemble.multi_network_experts import TimeSplitExpert, TruncatedExpert
from ensemble.pipeline import DDMPipeline
from ensemble.routing import CallCounts
from ensemble.sampling.images import to_bytes
from ensemble.sampling.sample import SampleResult
from experts.condition import Condition
from experts.expert import Expert
from experts.training.flops import forward_flops

log = logging.getLogger(__name__)

WEAK = "weak_"
"""Prefix of what belongs to the weak ensemble of a reflection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImages:
    """Images and what they cost."""

    images: UInt8[np.ndarray, "batch height width channel"]
    calls: CallCounts
    flops: float
    """Of all expert and router calls."""


def generate(
    folder: Path,
    seeds: Sequence[int],
    class_ids: Sequence[int] | None,
    sampling: SamplingConfig,
    workspace: Workspace,
) -> GeneratedImages:
    """One image for each seed; batches that an earlier attempt finished are read, not drawn again.

    Raises `Preempted` between two batches if it is asked to stop.
    """
    pipeline = DDMPipeline.from_pretrained(folder)
    if warning := missing_warning(pipeline.ensemble):
        log.warning(warning)
    weak = pipeline.weak(sampling)
    costs, weak_costs = RowFlops.of(pipeline), weak and RowFlops.of(replace(pipeline, ensemble=weak))
    kept = workspace.scratch / f"images-{_identity(folder, seeds, class_ids, sampling)}"
    kept.mkdir(parents=True, exist_ok=True)
    images, calls = [], CallCounts()
    for start in range(0, len(seeds), sampling.batch_size):
        workspace.report_progress(start, len(seeds), unit="images")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {start} of {len(seeds)} images, which are kept")
        rows = slice(start, start + sampling.batch_size)
        file = kept / f"{start:08d}.safetensors"
        if not file.exists():
            _write(file, pipeline(seeds[rows], sampling, class_ids and class_ids[rows], weak=weak))
        found = load_file(file)
        images.append(found["images"])
        calls.add(_calls_of(found))
    workspace.report_progress(len(seeds), len(seeds), unit="images")
    flops = costs.times(calls) + (weak_costs.times(calls.weak) if weak_costs and calls.weak else 0.0)
    return GeneratedImages(images=np.concatenate(images), calls=calls, flops=flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFlops:
    """Floating point operations of one call on one row."""

    experts: dict[int, float]
    """On an expert at a t that is drawn evenly, by its id."""
    networks: dict[str, float]
    """On each of their networks, by the names that `Calls.work` has for them."""
    router: float

    @classmethod
    def of(cls, pipeline: DDMPipeline) -> "RowFlops":
        """Counted from the operators that every expert and the router call."""
        ensemble = pipeline.ensemble
        row, t, null = torch.zeros(1, *pipeline.codec.latent_shape), torch.full((1,), 0.5), Condition.null(1)

        def parts(name: str, expert: ExpertModel) -> Iterator[tuple[str, float]]:
            if isinstance(expert, TimeSplitExpert):
                for number, network in enumerate(expert.networks):
                    yield from parts(f"{name}/{number}", network)
            elif isinstance(expert, TruncatedExpert):
                yield from parts(f"{name}/refiner", expert.refiner)
                if isinstance(draft := expert.draft, Expert):
                    yield from parts(f"{name}/draft", draft)
                else:
                    yield f"{name}/draft", forward_flops(partial(draft, row, null.embedding_index(expert.num_classes)))
            else:
                yield name, forward_flops(partial(expert.velocity, row, t, null, ensemble.noise_schedule))

        networks = {name: flops for k, one in ensemble.experts.items() for name, flops in parts(str(k), one)}
        return cls(
            experts={k: _mean_flops(str(k), one, networks) for k, one in ensemble.experts.items()},
            networks=networks,
            router=forward_flops(partial(ensemble.router.logits, row, t, null)) if ensemble.router else 0.0,
        )

    def times(self, calls: CallCounts) -> float:
        """Floating point operations of these calls."""
        experts = sum(self.networks[name] * count for name, count in calls.full_calls.items())
        return experts + self.router * calls.router


def _mean_flops(name: str, expert: ExpertModel, networks: Mapping[str, float]) -> float:
    """Of a call at a t that is drawn evenly."""
    if isinstance(expert, TruncatedExpert):
        return networks[f"{name}/refiner"]
    if not isinstance(expert, TimeSplitExpert):
        return networks[name]
    parts = enumerate(zip(expert.widths, expert.networks, strict=True))
    return sum(width * _mean_flops(f"{name}/{number}", network, networks) for number, (width, network) in parts)


def _identity(folder: Path, seeds: Sequence[int], class_ids: Sequence[int] | None, sampling: SamplingConfig) -> str:
    """What the images depend on, as 16 hex digits."""
    files = {str(path.relative_to(folder)): checksum(path) for path in files_in(folder)}
    if sampling.reflection is not None and sampling.reflection.path:
        weak = Path(sampling.reflection.path).expanduser()
        files |= {f"{WEAK}{path.relative_to(weak)}": checksum(path) for path in files_in(weak)}
    return fingerprint("images", [list(seeds), class_ids, sampling], files)[:16]


def _write(file: Path, drawn: SampleResult) -> None:
    arrays = {"images": to_bytes(drawn.images)} | _arrays_of(drawn.calls, "")
    if drawn.calls.weak is not None:
        arrays |= _arrays_of(drawn.calls.weak, WEAK)
    temporary = file.with_name(f".{file.name}")
    save_arrays(temporary, arrays)
    temporary.replace(file)


def _arrays_of(calls: CallCounts, prefix: str) -> dict[str, np.ndarray]:
    ids, names = sorted(calls.experts), sorted(calls.full_calls)
    return {
        f"{prefix}expert_ids": np.array(ids, np.int64),
        f"{prefix}expert_calls": np.array([calls.experts[k] for k in ids], np.int64),
        f"{prefix}networks": np.frombuffer("\n".join(names).encode(), np.uint8),
        f"{prefix}network_calls": np.array([calls.full_calls[name] for name in names], np.float64),
        f"{prefix}router_calls": np.array([calls.router], np.int64),
        f"{prefix}evaluations": np.array([calls.evaluations], np.int64),
    }


def _calls_of(found: dict[str, np.ndarray], prefix: str = "") -> CallCounts:
    ids, counts = found[f"{prefix}expert_ids"].tolist(), found[f"{prefix}expert_calls"].tolist()
    names = found[f"{prefix}networks"].tobytes().decode().splitlines()
    return CallCounts(
        experts=Counter(dict(zip(ids, counts, strict=True))),
        full_calls=dict(zip(names, found[f"{prefix}network_calls"].tolist(), strict=True)),
        router=int(found[f"{prefix}router_calls"][0]),
        evaluations=int(found[f"{prefix}evaluations"][0]),
        weak=_calls_of(found, WEAK) if not prefix and f"{WEAK}expert_ids" in found else None,
    )
