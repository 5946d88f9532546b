"""A diffusers model as a folder: `config.json` and safetensors, and no file that could run code.

`structure.json` lists the layers and units that a pruned model lacks, `quantization_config.json` its quantized modules.
Original models have neither. The `config.json` of a compressed one names a quantization that diffusers does not know,
and so diffusers refuses it.

diffusers' `from_pretrained` initializes missing tensors at random, ignores unknown ones, and follows an index to files
of any kind, pickles included. `load_model` requires every tensor of the model and no other.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from ddm_core.json_values import from_json
from experts.compressed.pruning.structure import Structure
from experts.compressed.quantization.registry import quantized_modules, replace_modules
from experts.conditions.null_text import save_null_text
from experts.networks.pretrained_files import weight_files

STRUCTURE, QUANTIZATION_CONFIG = "structure.json", "quantization_config.json"
DIFFUSERS_CONFIG = "quantization_config"
COMPRESSED = {"quant_method": "ddm, which ddm.DDMPipeline reads and diffusers does not"}
REMEDY = "copy it again from where it was trained, or train it again"


def save_model(model: nn.Module, folder: Path) -> None:
    """Write the model as diffusers does, with its structure and its quantized modules."""
    saver: Any = model
    saver.save_pretrained(folder, safe_serialization=True)
    save_null_text(model, folder)
    structure, quantized = Structure.from_model(model), quantized_modules(model)
    if not structure.is_unpruned:
        write_json(folder / STRUCTURE, structure)
    if quantized:
        write_json(folder / QUANTIZATION_CONFIG, quantized)
    if quantized or not structure.is_unpruned:
        write_json(folder / "config.json", read_json(folder / "config.json") | {DIFFUSERS_CONFIG: COMPRESSED})


def move_model(model: nn.Module, device: torch.device | str) -> None:
    """Move a model to a device, in place; one that is there already is not walked through."""
    last = _last_moved(model)
    if last is None or last.device != torch.device(device):
        model.to(device)


def _last_moved(module: nn.Module) -> Tensor | None:
    """Return a parameter of the module that `Module.to` moves last, so that a move that failed is tried again."""
    own = list(module.parameters(recurse=False))
    if own:
        return own[-1]
    found = map(_last_moved, reversed(list(module.children())))
    return next((parameter for parameter in found if parameter is not None), None)


LAST_EPSILON = "_norm_out_eps"
"""Key of `config.json` that diffusers ignores: epsilon of a network's last norm, where it is not that of its class."""


def set_last_epsilon(model: Any, epsilon: float) -> None:
    """Give the last norm of a network another epsilon, in place, which its folder keeps."""
    model.norm_out.eps = epsilon
    model.register_to_config(**{LAST_EPSILON: epsilon})


DERIVED = {"AutoencoderTiny": ("block_out_channels",)}
"""Settings that a class adds to its config itself, and does not take."""


def load_model(classes: tuple[type[nn.Module], ...], folder: Path) -> nn.Module:
    """Load a model of one of these classes for inference; raise `CorruptArtifact` if that fails."""
    by_name: dict[str, Any] = {candidate.__name__: candidate for candidate in classes}
    model_class = by_name[read_class_name(folder, by_name)]
    config = read_json(folder / "config.json")
    settings = _read_settings(model_class, config, folder)
    try:
        _check_size(model_class, settings, folder)
        with SkipRandomInit():
            model: nn.Module = model_class(**settings)
        if (folder / STRUCTURE).exists():
            from_json(Structure, read_json(folder / STRUCTURE)).apply(model)
        if (folder / QUANTIZATION_CONFIG).exists():
            replace_modules(model, read_json(folder / QUANTIZATION_CONFIG))
        if LAST_EPSILON in config:
            set_last_epsilon(model, float(config[LAST_EPSILON]))
        found = _copy_tensors(model, folder)
    except (SafetensorError, FileNotFoundError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _incomplete(model_class, folder, " ".join(str(error).split())) from error
    _check_names(model, found, folder)
    return model.eval()


def check_tensors(model_class: type[nn.Module], folder: Path) -> None:
    """Raise `CorruptArtifact` if the files of an original network lack tensors or have others; name every one.

    Reads no weights, and allocates none. Compressed networks are left to `load_model`.
    """
    if (folder / STRUCTURE).exists() or (folder / QUANTIZATION_CONFIG).exists():
        return
    settings = _read_settings(model_class, read_json(folder / "config.json"), folder)
    found: set[str] = set()
    try:
        _check_size(model_class, settings, folder)
        with torch.device("meta"):
            model = model_class(**settings)
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as tensors, torch.device("meta"):
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
                found |= _rename_tensors(model, {name: torch.empty(shape) for name, shape in shapes.items()}).keys()
    except (SafetensorError, FileNotFoundError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _incomplete(model_class, folder, " ".join(str(error).split())) from error
    _check_names(model, found, folder)


def _read_settings(model_class: type[nn.Module], config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the arguments of a network from its `config.json`; raise `CorruptArtifact` for one it does not take."""
    name = model_class.__name__
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if settings.get(DIFFUSERS_CONFIG) == COMPRESSED:
        del settings[DIFFUSERS_CONFIG]
    for key in DERIVED.get(name, ()):
        settings.pop(key, None)
    if unknown := sorted(settings.keys() - inspect.signature(model_class).parameters.keys()):
        raise CorruptArtifact(f"{folder / 'config.json'} has keys that {name} does not take: {', '.join(unknown[:5])}")
    return settings


def _check_names(model: nn.Module, found: Collection[str], folder: Path) -> None:
    """Raise `CorruptArtifact` with the name of every tensor that is missing or unknown."""
    expected = model.state_dict().keys()
    if faults := _list_names("has no", expected - found) + _list_names("has the unknown", found - expected):
        raise _incomplete(type(model), folder, f"it {' and '.join(faults)}")


def _incomplete(model_class: type[nn.Module], folder: Path, reason: str) -> CorruptArtifact:
    return CorruptArtifact(f"{folder} does not hold a complete {model_class.__name__}: {reason}; {REMEDY}")


def _list_names(what: str, names: Collection[str]) -> list[str]:
    """Return a clause with every name; none without names."""
    return [f"{what} {', '.join(sorted(names))}"] if names else []


class SkipRandomInit(TorchFunctionMode):
    """Leaves new parameters without random numbers while the block lasts: memory that nothing has touched is free.

    A call below `torch.nn.init` fills with one number, the mean or the lower bound. `trunc_normal_` draws again until
    every number lies within its bounds, and what memory happens to hold may never do so.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call any function but those that fill a tensor with random numbers."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (Tensor.normal_, Tensor.uniform_):
            lowest = kwargs.get("mean" if func is Tensor.normal_ else "from", 0.0)
            return args[0].fill_(args[1] if len(args) > 1 else lowest)
        return func(*args, **kwargs)


def read_class_name(folder: Path, known: Collection[str]) -> str:
    """Return the name of the class of a model; raise `CorruptArtifact` unless it is a known one."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in known:
        raise CorruptArtifact(f"{folder} holds a network of class {name!r}; known are {', '.join(known)}")
    return name


MAX_ELEMENTS_PER_BYTE = 64
"""Elements of an original network per byte of its file: weights of two bits, of which nine tenths were pruned."""


def _check_size(model_class: Any, settings: dict[str, Any], folder: Path) -> None:
    """Compare the network that `config.json` describes with the tensors in its files, before memory is allocated.

    A folder may come from anyone, and a `config.json` of a few bytes can describe a network of any size.
    """
    with torch.device("meta"):
        configured = {name: tuple(tensor.shape) for name, tensor in model_class(**settings).state_dict().items()}
    files = weight_files(folder)
    elements, size = sum(map(math.prod, configured.values())), sum(path.stat().st_size for path in files)
    if elements > MAX_ELEMENTS_PER_BYTE * size:
        raise ValueError(f"config.json describes {elements:,} elements, which its files of {size:,} bytes cannot hold")
    if (folder / STRUCTURE).exists() or (folder / QUANTIZATION_CONFIG).exists():
        return
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                shape = tuple(tensors.get_slice(name).get_shape())
                expected = configured.get(name, shape)
                if expected != shape:
                    raise ValueError(f"size mismatch for {name}: {list(shape)}, but config.json has {list(expected)}")


def _copy_tensors(model: Any, folder: Path) -> set[str]:
    """Copy the tensors of all files into the model, and return their names, old attention layers' changed to present.

    Files are mapped one at a time, so that memory holds the parameters once. Raises `RuntimeError` for another shape.
    """
    names: set[str] = set()
    for path in weight_files(folder):
        tensors = _rename_tensors(model, load_file(path))
        model.load_state_dict(tensors, strict=False)
        names |= tensors.keys()
    return names


def _rename_tensors(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a file by their present names, without those that the class ignores; changes the dictionary."""
    model._fix_state_dict_keys_on_load(tensors)
    for name in model._keys_to_ignore_on_load_unexpected or ():
        tensors.pop(name, None)
    return tensors
