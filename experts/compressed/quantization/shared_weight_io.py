"""Folder of the shared bases: `shared.json` lists their formats, `shared.safetensors` holds their tensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from ddm_core.json_values import from_json
from experts.compressed.quantization.shared_weight import MatrixFormat, SharedBase, StoredMatrix, shared_weights

SHARED = "shared"
INDEX, TENSORS = "shared.json", "shared.safetensors"


def collect_bases(models: Iterable[nn.Module]) -> dict[str, SharedBase]:
    """Return the bases of all models by the weight's name; raise `ValueError` if two bases have the same name."""
    bases: dict[str, SharedBase] = {}
    for model in models:
        for name, weight in shared_weights(model):
            if weight.base is None:
                raise ValueError(f"{name} is a shared weight without its base; load the ensemble's whole folder")
            if bases.setdefault(name, weight.base) is not weight.base:
                raise ValueError(f"experts of two ensembles share {name}; save each ensemble separately")
    return bases


def save_bases(bases: Mapping[str, SharedBase], folder: Path) -> None:
    """Write the bases to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    formats: dict[str, dict[str, MatrixFormat]] = {}
    tensors: dict[str, Tensor] = {}
    for name, base in sorted(bases.items()):
        parts = {part: module for part, module in base.parts.items() if isinstance(module, StoredMatrix)}
        formats[name] = {part: module.format for part, module in parts.items()}
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in base.parts.state_dict().items()}
    write_json(folder / INDEX, formats)
    save_file(tensors, folder / TENSORS)


def load_bases(folder: Path) -> dict[str, SharedBase]:
    """Read a folder that `save_bases` wrote; raise `CorruptArtifact` if it is incomplete or invalid."""
    index = read_json(folder / INDEX)
    try:
        tensors = load_file(folder / TENSORS)
        bases = {}
        for name, parts in index.items():
            base = SharedBase({part: StoredMatrix(from_json(MatrixFormat, entry)) for part, entry in parts.items()})
            base.parts.load_state_dict({key: tensors.pop(f"{name}.{key}") for key in base.parts.state_dict()})
            bases[name] = base
        if tensors:
            raise ValueError(f"{', '.join(sorted(tensors)[:5])} belong to no base")
    except (SafetensorError, FileNotFoundError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise CorruptArtifact(
            f"{folder} does not hold valid shared weights: {reason}; make the ensemble again"
        ) from error
    return bases


def link_bases(model: nn.Module, bases: Mapping[str, SharedBase]) -> int:
    """Link every shared weight of a model to its base, and return how many there are.

    Raises `CorruptArtifact` if a base is missing or has another shape.
    """
    count = 0
    for name, weight in shared_weights(model):
        try:
            weight.link(bases[name])
        except (KeyError, ValueError) as error:
            raise CorruptArtifact(
                f"an expert shares {name} with others, but its base is missing or invalid ({error}); "
                "load the ensemble's whole folder"
            ) from error
        count += 1
    return count
