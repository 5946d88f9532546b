"""LoRA adapters in the networks of experts, by peft: loaded, weighted and removed without a change to the weights.

Hu et al. 2021, arXiv:2106.09685. peft injects adapters into networks of every class; diffusers' own methods exist for
some classes only.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddm_core.artifacts import read_json
from ddm_core.errors import DDMError
from experts.networks.pretrained_files import weight_files

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of the weights in a folder: diffusers' and peft's."""
CONFIG, METADATA = "adapter_config.json", "lora_adapter_metadata"
PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|unet\.)+")
PART = re.compile(r"^(?P<module>.+)\.(?:lora_(?P<side>[AB])|(?:lora\.|lora_)(?P<old>down|up))(?:\.\w+)?\.weight$")
OLD_SIDES = {"down": "A", "up": "B"}
NEW = "default"
"""Name of an adapter that is trained."""


class AdapterError(DDMError, ValueError):
    """An adapter cannot be read, or does not fit a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayerWeights:
    """The two factors of one layer; its weight grows by alpha / rank * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Return the rank of the change."""
        return self.down.shape[0]


Lora = Mapping[str, LoraLayerWeights]
"""By the name of the layer in its network."""


def read_lora(path: Path) -> Lora:
    """Read a safetensors file of diffusers or peft, or a folder with one; raise `AdapterError` for any other."""
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise AdapterError(f"{path} must be a safetensors file, or a folder with {' or '.join(FILES)}; convert it")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
            settings = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is not a readable adapter: {error}; copy it again") from error
    if (file.parent / CONFIG).is_file():
        settings |= read_json(file.parent / CONFIG)
    settings = {PREFIX.sub("", str(key)): value for key, value in settings.items()}
    if unsupported := sorted(key for key in ("use_dora", "use_rslora") if settings.get(key)):
        raise AdapterError(f"{file} uses {unsupported[0]}, which is not supported; train a plain LoRA")
    return _read_layers(file, tensors, settings)


def check_lora(expert: Path, lora: Lora, name: str) -> None:
    """Raise `AdapterError` if an adapter does not fit the weights in an expert's folder, or peft is missing."""
    _import_peft()
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(expert):
        with safe_open(file, framework="pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    for path, weights in lora.items():
        _check_shape(path, shapes.get(f"{path}.weight", ()), weights, name)


def _read_layers(file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Lora:
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name = PREFIX.sub("", key)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
        elif match := PART.match(name):
            side = match["side"] or OLD_SIDES[match["old"]]
            sides.setdefault(match["module"], {})[side] = tensor
        else:
            raise AdapterError(f"{file} has {key}, which is no factor of a LoRA; convert it to diffusers' names")
    if not sides or any(len(pair) != 2 for pair in sides.values()):
        raise AdapterError(f"{file} must hold lora_A and lora_B of every layer; save the adapter again")
    patterns = settings.get("alpha_pattern") or {}
    alpha = settings.get("lora_alpha")
    return {
        module: LoraLayerWeights(
            down=pair["A"],
            up=pair["B"],
            alpha=float(alphas.get(module, patterns.get(module, pair["A"].shape[0] if alpha is None else alpha))),
        )
        for module, pair in sides.items()
    }


def add_lora(network: nn.Module, lora: Lora, name: str, weight: float = 1.0) -> None:
    """Inject an adapter, in place; raise `AdapterError`, with the network unchanged, if it does not fit."""
    peft = _import_peft()
    _check_fit(network, lora, name)
    config = peft.LoraConfig(
        r=max(layer.rank for layer in lora.values()),
        target_modules="|".join(re.escape(layer) for layer in lora),
        rank_pattern={f"^{re.escape(layer)}": weights.rank for layer, weights in lora.items()},
        alpha_pattern={f"^{re.escape(layer)}": weights.alpha for layer, weights in lora.items()},
    )
    vars(network).pop("peft_config", None)  # peft warns of adapters that it has already injected
    peft.inject_adapter_in_model(config, network, name)
    for module_name, layer in _lora_layers(network).items():
        if weights := lora.get(module_name):
            layer.lora_A[name].weight.data.copy_(weights.down)
            layer.lora_B[name].weight.data.copy_(weights.up)
            layer.set_scale(name, weight)
        layer.set_adapter(list(layer.lora_A))
    network.requires_grad_(requires_grad=False)


def _check_fit(network: nn.Module, lora: Lora, name: str) -> None:
    if name in adapter_names(network):
        raise AdapterError(f"the network has an adapter {name!r}; unload it, or choose another adapter_name")
    layers = {path.replace(".base_layer", ""): module for path, module in network.named_modules()}
    for path, weights in lora.items():
        layer: Any = layers.get(path)
        layer = layer.get_base_layer() if _is_lora(layer) else layer
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            known = [path for path, module in layers.items() if isinstance(module, nn.Linear)]
            raise AdapterError(
                f"{path} of adapter {name!r} is no linear or convolutional layer of {type(network).__name__} "
                f"(quantized layers take no adapter); it has {', '.join(known[:5])} ..."
            )
        _check_shape(path, tuple(layer.weight.shape), weights, name)


def _check_shape(path: str, shape: tuple[int, ...], weights: LoraLayerWeights, name: str) -> None:
    own = (weights.up.shape[0], *weights.down.shape[1:])
    if shape != own:
        reason = f"has weights of shape {shape}" if shape else "is no layer of the expert with plain weights"
        raise AdapterError(f"{path} {reason}, adapter {name!r} has {own}; choose an adapter of this model")


def set_weights(network: nn.Module, weights: Mapping[str, float]) -> None:
    """Activate adapters with these weights, which multiply alpha / rank, and no others."""
    for layer in _lora_layers(network).values():
        present = [name for name in weights if name in layer.lora_A]
        layer.set_adapter(present)
        for name in present:
            layer.set_scale(name, weights[name])


def adapter_names(network: nn.Module) -> list[str]:
    """Return the names of the adapters in a network."""
    return sorted({name for layer in _lora_layers(network).values() for name in layer.lora_A})


def remove_lora(network: nn.Module) -> None:
    """Remove all adapters, in place; the network has its own layers again."""
    for name, layer in _lora_layers(network).items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    vars(network).pop("peft_config", None)


def merge_lora(network: nn.Module) -> None:
    """Add all active adapters to the weights, in place; the network has its own layers again."""
    for layer in _lora_layers(network).values():
        layer.merge()
    remove_lora(network)


def add_new_lora(network: nn.Module, layers: Sequence[str], rank: int) -> None:
    """Inject an adapter to be trained into these linear or convolutional layers, in place; it changes nothing yet.

    Its parameters are the only ones with gradients, and come from torch's global generator.
    """
    lora = {}
    for path in layers:
        outputs, *inputs = network.get_submodule(path).weight.shape
        down = nn.init.kaiming_uniform_(torch.empty(rank, *inputs), a=math.sqrt(5))
        up = torch.zeros(outputs, rank, *[1] * (len(inputs) - 1))
        lora[path] = LoraLayerWeights(down=down, up=up, alpha=float(rank))
    add_lora(network, lora, NEW)
    for layer in _lora_layers(network).values():
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(requires_grad=True)


def layers_above_rank(network: nn.Module, rank: int) -> list[str]:
    """Return the linear and convolutional layers whose weights have more elements than an adapter of this rank."""
    return [
        path
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if layer.weight.numel() > rank * (len(layer.weight) + layer.weight[0].numel())
    ]


def extract_lora(network: nn.Module) -> Lora:
    """Return the adapter of a network that `add_new_lora` made."""
    return {
        path: LoraLayerWeights(
            down=layer.lora_A[NEW].weight.detach().clone(),
            up=layer.lora_B[NEW].weight.detach().clone(),
            alpha=float(layer.lora_alpha[NEW]),
        )
        for path, layer in _lora_layers(network).items()
    }


def save_lora(lora: Lora, folder: Path) -> None:
    """Write an adapter whose alpha is its rank, as diffusers does."""
    factors = {f"transformer.{path}.lora_A.weight": layer.down.contiguous() for path, layer in lora.items()}
    factors |= {f"transformer.{path}.lora_B.weight": layer.up.contiguous() for path, layer in lora.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / FILES[0], {"format": "pt"})


def _lora_layers(network: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if _is_lora(module)}


def _is_lora(module: Any) -> bool:
    """Return whether a module is one of peft's, which is not imported for a network without adapters."""
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _import_peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - most pipelines have no adapter
    except ImportError as error:
        raise AdapterError("adapters need the package peft; pip install 'decentralized-diffusion[lora]'") from error
    return peft
