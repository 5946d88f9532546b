"""A diffusers model as a folder: `config.json` and safetensors, and nothing that could run code.

diffusers' own `from_pretrained` starts what a file lacks at random, ignores what it does not know, and follows an index
to files of any kind, pickles among them. Here every parameter must be there, and no other.
"""

import inspect
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts import CorruptArtifact, read_json, write_json
from experts.packing import CODES, SCALES, Packing, pack, unpack

PACKED, PACKING = "packed.safetensors", "packing.json"
"""A folder whose weights are in few bits has these in the place of diffusers' files."""
DIFFUSERS = "diffusion_pytorch_model"
WAY_OUT = "copy it again from where it was trained, or train it again"


def save_model(model: nn.Module, folder: Path) -> None:
    """Write the model as diffusers does."""
    saver: Any = model
    saver.save_pretrained(folder, safe_serialization=True)


def load_model(classes: tuple[type[nn.Module], ...], folder: Path) -> nn.Module:
    """A model of one of these classes, ready for inference; raises `CorruptArtifact` if it is not whole, or another."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    model_class: Any = next((known for known in classes if known.__name__ == name), None)
    if model_class is None:
        names = ", ".join(known.__name__ for known in classes)
        raise CorruptArtifact(f"{folder} holds a network of class {name!r}; known are {names}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(settings.keys() - inspect.signature(model_class).parameters.keys()):
        raise CorruptArtifact(f"{folder / 'config.json'} has keys that {name} does not know: {', '.join(unknown[:5])}")
    try:
        model: nn.Module = model_class(**settings)
        model.load_state_dict(_read_tensors(folder))
    except (SafetensorError, FileNotFoundError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise CorruptArtifact(f"{folder} does not hold a whole {name}: {reason}; {WAY_OUT}") from error
    return model.eval()


def pack_folder(folder: Path, bits: Literal[4, 8], group: int, least: int) -> int:
    """Replace every matrix of at least `least` entries by its codes, and return how many there were.

    The folder keeps its `config.json`; what is packed already is an error. Who loads it gets float32, rounded.
    """
    if (folder / PACKING).exists():
        raise ValueError(f"{folder} is packed already; pack the ensemble that it was made from")
    tensors, packings = _read_tensors(folder), {}
    for name, tensor in list(tensors.items()):
        if tensor.ndim >= 2 and tensor.numel() >= least and tensor.is_floating_point():
            packings[name] = Packing(bits=bits, group=group, shape=tuple(tensor.shape))
            tensors[name + CODES], tensors[name + SCALES] = pack(tensors.pop(name), packings[name])
    if packings:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / PACKED)
        write_json(folder / PACKING, packings)
        for file in folder.glob(f"{DIFFUSERS}*"):
            file.unlink()
    return len(packings)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All parameters; diffusers writes a large model into several files."""
    if (folder / PACKING).exists():
        return _unpacked(folder)
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{DIFFUSERS}*.safetensors")):
        found |= load_file(path)
    if not found:
        raise FileNotFoundError(f"no file {DIFFUSERS}*.safetensors is there; pickles are not read")
    return found


def _unpacked(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / PACKED)
    try:
        packings = {str(name): Packing.parsed(given) for name, given in read_json(folder / PACKING).items()}
        for name, packing in packings.items():
            found[name] = unpack(found.pop(name + CODES), found.pop(name + SCALES), packing)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"{folder / PACKING} does not fit {PACKED}: {error}") from error
    return found
