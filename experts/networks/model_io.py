"""A diffusers model as a folder: `config.json` and safetensors, and nothing that could run code.

`structure.json` says what a pruned model lacks of its configuration, `quantization_config.json` which of its layers and weights have
been replaced. Whole models have neither.

diffusers' own `from_pretrained` starts what a file lacks at random, ignores what it does not know, and follows an index
to files of any kind, pickles among them. Here every parameter must be there, and no other.
"""

import inspect
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.compressed.pruning.structure import Structure
from experts.compressed.quantization.registry import quantized_modules, replace_modules

STRUCTURE, FORMS = "structure.json", "quantization_config.json"
DIFFUSERS = "diffusion_pytorch_model"
WAY_OUT = "copy it again from where it was trained, or train it again"


def save_model(model: nn.Module, folder: Path) -> None:
    """Write the model as diffusers does, and what it lacks or has replaced."""
    saver: Any = model
    saver.save_pretrained(folder, safe_serialization=True)
    structure, forms = Structure.of(model), quantized_modules(model)
    if not structure.is_whole:
        write_json(folder / STRUCTURE, structure)
    if forms:
        write_json(folder / FORMS, forms)


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
        if (folder / STRUCTURE).exists():
            Structure.parsed(read_json(folder / STRUCTURE)).apply(model)
        if (folder / FORMS).exists():
            replace_modules(model, read_json(folder / FORMS))
        model.load_state_dict(_read_tensors(folder))
    except (SafetensorError, FileNotFoundError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise CorruptArtifact(f"{folder} does not hold a whole {name}: {reason}; {WAY_OUT}") from error
    return model.eval()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All parameters; diffusers writes a large model into several files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{DIFFUSERS}*.safetensors")):
        found |= load_file(path)
    if not found:
        raise FileNotFoundError(f"no file {DIFFUSERS}*.safetensors is there; pickles are not read")
    return found
