"""Model folders of strangers: their size is checked before memory is allocated, and diffusers reads the same weights.

The oracle for folders with several files is diffusers itself.
"""

import subprocess
import sys

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.architectures.residual_mlp import ResidualMLP
from experts.compressed.pruning.layers import removable_layers, remove_layers
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.config import DiTConfig, UNetConfig
from experts.networks.model_io import SkipRandomInit, move_model, save_model
from experts.networks.pretrained_files import WEIGHTS, WEIGHTS_INDEX
from experts.networks.registry import build_network, load_network


@pytest.fixture
def folder(tmp_path):
    save_model(ResidualMLP(latent_shape=[4], width=16, depth=1), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **settings):
    write_json(folder / "config.json", read_json(folder / "config.json") | settings)


@pytest.mark.parametrize("width", [17, 12_000, 40_000, 1_000_000])
def test_width_that_the_file_does_not_have_is_refused(folder, width):
    change_config(folder, width=width)
    with pytest.raises(CorruptArtifact, match="size mismatch|cannot hold"):
        load_network(folder)


def test_huge_network_is_refused_within_little_memory(folder):
    change_config(folder, width=40_000)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from ddm_core.artifacts import CorruptArtifact; from experts.networks.registry import load_network\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_network(Path(sys.argv[1]))\n"
        "except CorruptArtifact: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 200 * 1024, "KiB more than after the imports"


KINDS = {
    "unet": (UNet2DModel, UNetConfig(channels=(8, 16), layers_per_block=1)),
    "dit": (DiTTransformer2DModel, DiTConfig(patch_size=4, heads=2, head_width=16, depth=2)),
}
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def random_network(kind):
    model = build_network(KINDS[kind][1], (1, 8, 8), 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def add_neighbours(folder):
    """Add files of a variant, of another step, and a pickle, with other weights."""
    other = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    for suffix in ("step1000", "fp16", "fp16-00001-of-00001"):
        save_file(other, folder / f"diffusion_pytorch_model.{suffix}.safetensors", {"format": "pt"})
    torch.save(other, folder / "diffusion_pytorch_model.bin")


def rename_attention(folder):
    """Name the attention's parameters as diffusers did before version 0.15."""
    renamed = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    save_file(renamed, folder / WEIGHTS, {"format": "pt"})


def split_weights(folder):
    """Write the weights into several files with an index, and leave an old whole file beside them."""
    model = UNet2DModel.from_pretrained(folder, use_safetensors=True)
    model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / WEIGHTS_INDEX).is_file()
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "change", [add_neighbours, rename_attention, split_weights], ids=lambda change: change.__name__
)
def test_loaded_weights_are_those_that_diffusers_loads(change, tmp_path):
    original = random_network("unet")
    save_model(original, tmp_path)
    change(tmp_path)
    expected = UNet2DModel.from_pretrained(tmp_path, use_safetensors=True).state_dict()
    actual = load_network(tmp_path).state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(actual[name], expected[name]) and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "diffusion_pytorch_model.bin", 7, None])
def test_index_of_other_files_counts_as_none(name, folder):
    expected = load_network(folder).state_dict()
    write_json(folder / WEIGHTS_INDEX, {"weight_map": {"exit.bias": name}})
    actual = load_network(folder).state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CorruptArtifact, match="there is no file"):
        load_network(folder)


def test_variant_without_a_whole_file_is_refused_with_its_name(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CorruptArtifact, match=r"it has diffusion_pytorch_model\.fp16\.safetensors: rename"):
        load_network(folder)


@pytest.mark.parametrize("change", ["quantize", "prune"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_refuses_a_compressed_network(kind, change, tmp_path):
    model, model_class = random_network(kind), KINDS[kind][0]
    save_model(model, tmp_path / "original")
    model_class.from_pretrained(tmp_path / "original", use_safetensors=True)
    if change == "quantize":
        name = next(name for name, weight in model.named_parameters() if weight.ndim == 2)
        pack_weight(model, name, Packing(bits=4, group_size=8, shape=tuple(model.get_parameter(name).shape)))
    else:
        remove_layers(model, removable_layers(model)[-1:])
    save_model(model, tmp_path / "compressed")
    with pytest.raises(ValueError, match=r"ddm\.DDMPipeline"):
        model_class.from_pretrained(tmp_path / "compressed")
    loaded = load_network(tmp_path / "compressed").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_and_unknown_tensor_is_named(kind, tmp_path):
    save_model(random_network(kind), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    missing = sorted(tensors)[:3]
    changed = {name: tensor for name, tensor in tensors.items() if name not in missing} | {"extra.bias": torch.ones(1)}
    save_file(changed, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CorruptArtifact, match=rf"has no {', '.join(missing)} and has the unknown extra\.bias;"):
        load_network(tmp_path)
    save_file({"extra.bias": torch.ones(1000)}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CorruptArtifact, match=rf"has no {', '.join(sorted(tensors))} and has the unknown"):
        load_network(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_draws_no_random_numbers(kind, tmp_path):
    model = random_network(kind)
    save_model(model, tmp_path)
    state = torch.get_rng_state()
    loaded = load_network(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, dict(model.named_buffers())[name]) for name, tensor in loaded.named_buffers())


WATCH_LOADING = """
import sys, threading
from pathlib import Path
from experts.networks.registry import load_network

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

before, peaks, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.002):
        peaks.append(anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_network(Path(sys.argv[1]))
peaks.append(anonymous())
done.set()
print(max(peaks) - before)
"""


def test_loading_allocates_the_parameters_once(tmp_path):
    save_model(ResidualMLP(latent_shape=[64], width=2048, depth=4), tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    process = subprocess.run(
        [sys.executable, "-c", WATCH_LOADING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 0.9 * size < int(process.stdout) < 1.25 * size


@pytest.mark.parametrize(("mean", "low"), [(0.0, -2.0), (1.0, 0.5), (3.0, 0.0)])
def test_initialization_without_random_numbers_is_in_bounds(mean, low):
    def what_memory_held():
        return torch.full((64, 64), 9.0)

    with SkipRandomInit():
        assert torch.equal(what_memory_held().normal_(mean, 0.1), torch.full((64, 64), mean))
        assert torch.equal(what_memory_held().uniform_(low, 7), torch.full((64, 64), low))
        drawn = nn.init.trunc_normal_(what_memory_held(), mean=mean, a=low, b=low + 2)
    assert drawn.min() >= low and drawn.max() <= low + 2


def test_model_is_moved_unless_it_is_there():
    moves = []

    class Model(nn.Sequential):
        def to(self, *args, **kwargs):
            moves.append(args)
            return super().to(*args, **kwargs)

    model = Model(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    move_model(model, "cpu")
    assert not moves
    move_model(model, "meta")
    move_model(model, torch.device("meta"))
    assert moves == [("meta",)] and all(parameter.is_meta for parameter in model.parameters())
    half_moved = Model(nn.Linear(2, 2).to("meta"), nn.Linear(2, 2))
    move_model(half_moved, "meta")
    assert all(parameter.is_meta for parameter in half_moved.parameters())
