"""Model folders of strangers: what config.json describes is compared with the files before memory is allocated."""

import subprocess
import sys

import pytest

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.architectures.residual_mlp import ResidualMLP
from experts.networks.model_io import save_model
from experts.networks.registry import load_network


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
