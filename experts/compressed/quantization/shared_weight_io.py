"""What experts share, as a folder beside theirs: `shared.json` says what is there, `shared.safetensors` holds it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.compressed.quantization.shared_weight import MatrixFormat, SharedBase, StoredMatrix, shared_weights

SHARED = "shared"
DESCRIBED, TENSORS = "shared.json", "shared.safetensors"


def bases_of(models: Iterable[nn.Module]) -> dict[str, SharedBase]:
    """The bases of all models by the weight's name; `ValueError` if two models have another one of the same name."""
    found: dict[str, SharedBase] = {}
    for model in models:
        for name, form in shared_weights(model):
            if form.base is None:
                raise ValueError(f"{name} is a shared weight without its base; load the ensemble's whole folder")
            if found.setdefault(name, form.base) is not form.base:
                raise ValueError(f"experts of two ensembles share {name}; save those of each apart")
    return found


def save_bases(bases: Mapping[str, SharedBase], folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, dict[str, object]] = {}
    tensors: dict[str, Tensor] = {}
    for name, base in sorted(bases.items()):
        parts = {part: module for part, module in base.parts.items() if isinstance(module, StoredMatrix)}
        described[name] = {part: asdict(module.storage) for part, module in parts.items()}
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in base.parts.state_dict().items()}
    write_json(folder / DESCRIBED, described)
    save_file(tensors, folder / TENSORS)


def load_bases(folder: Path) -> dict[str, SharedBase]:
    """Read what `save_bases` wrote; raises a `CorruptArtifact` if it is not whole."""
    described = read_json(folder / DESCRIBED)
    try:
        tensors = load_file(folder / TENSORS)
        bases = {}
        for name, parts in described.items():
            base = SharedBase({part: StoredMatrix(MatrixFormat.parsed(storage)) for part, storage in parts.items()})
            base.parts.load_state_dict({key: tensors.pop(f"{name}.{key}") for key in base.parts.state_dict()})
            bases[name] = base
        if tensors:
            raise ValueError(f"{', '.join(sorted(tensors)[:5])} belong to no base")
    except (SafetensorError, FileNotFoundError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise CorruptArtifact(
            f"{folder} does not hold what experts share: {reason}; make the ensemble again"
        ) from error
    return bases


def link(model: nn.Module, bases: Mapping[str, SharedBase]) -> int:
    """Link every shared weight of a model to its base, and return how many there are.

    Raises `CorruptArtifact` if one has no base, or one of another shape.
    """
    count = 0
    for name, form in shared_weights(model):
        try:
            form.link(bases[name])
        except (KeyError, ValueError) as error:
            raise CorruptArtifact(f"an expert shares {name} with others, which is not there ({error})") from error
        count += 1
    return count
