"""Attacks on a pipeline's folder: each changes a valid one with DiT experts so that loading it must be refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from ddm_core.artifacts import read_json, write_json

Attack = Callable[[Path], object]
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = ("pytorch_model.bin", "model.ckpt", "optimizer.pt", "extra.pth", "cache.pkl", "Cache.PICKLE")
CODE = ("pipeline.py", "expert_0/model.py", "codec/hidden.pyc", "router/fast.so")
HEADER_BYTES = 10**9


def list_attacks(experts: int) -> dict[str, Attack]:
    """Return all attacks on a pipeline of so many experts, by what they do."""
    networks = [*(f"expert_{k}" for k in range(experts)), "router"]
    attacks: dict[str, Attack] = {"scheduler of another module": _name_other_scheduler}
    attacks["remote class in the index"] = _name_remote_class
    for name in PICKLES:
        attacks |= {f"pickle {part}/{name}": _writer(f"{part}/{name}", _save_pickle) for part in (*networks, "codec")}
    attacks |= {f"code {name}": _writer(name, _save_code) for name in CODE}
    for path in ("codec/codec.json", "model_index.json", f"expert_0/{WEIGHTS}", "router/router.json"):
        attacks[f"link {path}"] = _writer(path, _link_outside)
    for part in networks:
        attacks[f"header of 1 GB, {part}"] = _writer(f"{part}/{WEIGHTS}", _claim_header)
        attacks[f"sparse file of 1 TB, {part}"] = _writer(f"{part}/{WEIGHTS}", _claim_sparse)
        attacks[f"tensor of 4 TB, {part}"] = _writer(f"{part}/{WEIGHTS}", _claim_tensor)
        attacks[f"pickle in the index of {part}"] = _writer(f"{part}/{WEIGHTS}", _index_pickle)
    for k in range(experts):
        attacks[f"huge network, expert {k}"] = _writer(f"expert_{k}/config.json", _claim_network)
    return attacks


def _writer(name: str, change: Callable[[Path], object]) -> Attack:
    return lambda folder: change(folder / name)


def _save_pickle(path: Path) -> None:
    torch.save({}, path)


def _save_code(path: Path) -> None:
    path.write_text("raise SystemExit('this code ran')")


def _link_outside(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def _claim_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", HEADER_BYTES) + b"{" + b" " * 100)


def _claim_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES))
        file.truncate(10**12)


def _claim_tensor(path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)


def _claim_network(path: Path) -> None:
    write_json(path, read_json(path) | {"num_layers": 400, "attention_head_dim": 4096})


def _index_pickle(path: Path) -> None:
    path.rename(path.with_name("other.safetensors"))
    index = {"metadata": {}, "weight_map": {"pos_embed.proj.weight": "../../evil.bin"}}
    write_json(path.with_name(f"{WEIGHTS}.index.json"), index)


def _name_remote_class(folder: Path) -> None:
    path = folder / "model_index.json"
    write_json(path, read_json(path) | {"_class_name": ["pipeline", "DDMPipeline"]})


def _name_other_scheduler(folder: Path) -> None:
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "os.system"})
