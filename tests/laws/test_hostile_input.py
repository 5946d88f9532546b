"""Untrusted input (tars, images, captions, weights, YAML) is rejected by name, and never executed or followed."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.datasets.captions import MAX_ANNOTATION_BYTES, MAX_CAPTION
from data_partition.datasets.image_folder import list_class_names, read_image_tree
from data_partition.datasets.source import Unreadable
from data_partition.datasets.webdataset_source import read_urls
from data_partition.errors import ShardError, TooManyUnreadable, UnprintableName, UnreadableImage
from data_partition.shards.images import decode_image
from data_partition.shards.shards import Sample
from data_partition.shards.tar import MAX_SAMPLE_BYTES, read_tar
from data_partition.shards.untrusted import is_printable
from ddm_core.artifacts import ArtifactError, CorruptArtifact, Workspace, publish, read_json, write_json
from ensemble.pipeline import EnsemblePipeline, assemble
from ensemble.pipeline_folder import PipelineError
from experts.codecs.registry import load_codec
from experts.expert import Expert
from orchestrator.config.hydra_compose import compose, config_folder
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.hydra_entry import run_sweep
from router.router import Router
from tests.data_partition.datasets.test_image_folder import write
from tests.data_partition.datasets.test_webdataset_source import PNG
from tests.data_partition.shards.test_tar import make_tar
from tests.ensemble.test_pipeline import make_expert, parts, put_together  # noqa: F401 - `parts` is a fixture

TEN_GB = 10 * 2**30


def member(name: str = "x.png", size: int = 0, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in more.items():
        setattr(info, key, value)
    return info


def tar_with(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_claiming(size: bytes) -> bytes:
    """Return a tar whose first header claims another size, in the base-256 form that goes beyond 8 GB and below 0."""
    header = bytearray(tar_with((member(size=5), b"hello"))[:512])
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(2048)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"Z"],
)
def test_read_tar_rejects_links_devices_and_pipes(kind):
    hostile = tar_with((member("a.png", 3), b"png"), (member(type=kind, linkname="/etc/passwd"), b""))
    if kind == tarfile.CONTTYPE:  # an old name for a plain file
        assert len(list(read_tar(io.BytesIO(hostile), "t"))) == 2
        return
    with pytest.raises(ShardError, match="'x.png' is a link, a device or a file with holes"):
        list(read_tar(io.BytesIO(hostile), "t"))


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (tar_claiming(b"\x80" + TEN_GB.to_bytes(11, "big")), "claims 10737418240 bytes"),
        (tar_claiming(b"\xff" * 10 + b"\x00\x00"), "claims -65536 bytes"),
        (tar_with((member(size=5, pax_headers={"size": str(TEN_GB)}), b"hello")), "claims 107374"),
        (tar_with((member(size=5, pax_headers={"size": "-512"}), b"hello")), "backwards"),
        (
            tar_with((member(size=5, pax_headers={"GNU.sparse.map": "0,5", "GNU.sparse.size": str(TEN_GB)}), b"hello")),
            "holes",
        ),
        (tar_with((member(size=1, pax_headers={"path": "../../x.png"}), b"h")), "points outside its folder"),
        (tar_with((member(size=1, pax_headers={"path": "/etc/x.png"}), b"h")), "points outside its folder"),
        (tar_with((member(size=1, pax_headers={"path": "a\0b.png"}), b"h")), r"'a\\x00b.png' has control"),
        (tar_with((member("\x1b[2J.png", 1), b"h")), r"'\\x1b\[2J.png' has control"),
        (tar_with((member("x" * 5000 + ".png", 1), b"h")), "5004 characters"),
    ],
)
def test_read_tar_rejects_huge_sizes_and_unsafe_names(hostile, message):
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(ShardError, match=message):
        list(read_tar(io.BytesIO(hostile), "hostile.tar"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20 and time.process_time() - started < 1


@pytest.mark.parametrize(
    "between", [(), ((member("README", 0), b""),), ((member("deep", 0, type=tarfile.DIRTYPE), b""),)]
)
def test_read_tar_rejects_sample_over_memory_limit(monkeypatch, between):
    """Each member and the file are small; the limit applies to the memory of the sample."""
    monkeypatch.setattr("data_partition.shards.tar.MAX_SAMPLE_BYTES", 2**20)
    size = 300 * 2**10
    bomb = gzip.compress(
        tar_with(*(part for k in range(4) for part in ((member(f"x.a{k}", size), bytes(size)), *between)))
    )
    assert len(bomb) < 10_000
    with pytest.raises(ShardError, match="'x.a3' claims 1230848 bytes, at most 1048576 a sample"):
        list(read_tar(io.BytesIO(bomb), "t"))


def test_read_urls_escapes_names_without_utf8(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_with((member("caf\udce9.png", len(PNG)), PNG), kind=tarfile.GNU_FORMAT))
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    assert sample.key.isascii() and "caf" in sample.key


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(64 * 2**20), 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_of(100_000, 100_000, (b"IDAT", BOMB)), "decompression bomb"),
        (png_of(10_000, 10_000, (b"IDAT", BOMB)), "pixels"),
        (png_of(9_000, 9_000, (b"IDAT", BOMB)), "9000x9000 are more than"),
        (png_of(2**31 - 1, 2**31 - 1), "decompression bomb"),
        (png_of(4, 4, (b"zTXt", b"k\0\0" + BOMB), (b"IDAT", zlib.compress(bytes(52)))), "too large"),
        (png_of(4, 4, (b"iCCP", b"k\0\0" + BOMB), (b"IDAT", b"")), "not a readable image"),
        (PNG[:45], "not a readable image"),
        (b"P6 100000 100000 255 ", "bomb|pixels"),
        (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", "not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n", "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not a readable image"),
        (b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {\n0x00 };\n", "not a readable image"),
    ],
)
def test_decode_image_rejects_bombs_and_programs(data, message):
    started = time.process_time()
    with pytest.raises(UnreadableImage, match=message):
        decode_image(data)
    assert time.process_time() - started < 1 and len(data) < 100_000


def test_decode_image_rejects_tiff_with_fractions():
    """Pillow raises a TypeError for this file."""
    entries = [
        (256, 3, 1, 4),
        (257, 3, 1, 4),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 5, 1, 8),
        (278, 3, 1, 4),
        (279, 3, 1, 16),
    ]
    data = b"II*\0" + struct.pack("<I", 24) + struct.pack("<IIII", 1, 2, 0, 0)
    data += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    with pytest.raises(UnreadableImage):
        decode_image(data)


CONTROLS = ["\x1b[31mred", "bell\x07", "zero\x00", "\x9b2J", "back\x08\x08", "\x7f", "half \ud83d"]


@pytest.mark.parametrize("caption", CONTROLS)
@pytest.mark.parametrize("place", ["txt", "json"])
def test_read_urls_keeps_no_control_code_of_a_caption(tmp_path, caption, place):
    data = caption.encode("utf-8", "surrogatepass") if place == "txt" else json.dumps({"caption": caption}).encode()
    (tmp_path / "a.tar").write_bytes(make_tar({"x.png": PNG, f"x.{place}": data}).getvalue())
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    if isinstance(sample, Unreadable):
        assert "codec can't decode" in sample.reason and sample.reason.isprintable()
    else:
        assert is_printable(sample.caption) and all(map(is_printable, (text for text, _ in sample.more_captions)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.txt": b"a" * (MAX_CAPTION + 1)}, f"has {MAX_CAPTION + 1} characters"),
        ({"x.txt": b"a" * (MAX_ANNOTATION_BYTES + 1)}, f".txt has {MAX_ANNOTATION_BYTES + 1} bytes"),
        ({"x.json": b"[" * 500_000}, "recursion"),
        ({"x.cls": b"9" * 5000}, "4300 digits"),
        ({"x.json": b'{"label": 1e999}'}, "inf"),
    ],
)
def test_read_urls_rejects_huge_annotations(tmp_path, files, message):
    (tmp_path / "a.tar").write_bytes(make_tar({"x.png": PNG} | files).getvalue())
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(sample, Unreadable) and message in sample.reason


def test_read_urls_divides_caption_lines_and_keeps_unicode(tmp_path):
    caption = "  a cat\r\n\ton a mat, 猫 и кот 👩‍👩‍👧  "
    (tmp_path / "a.tar").write_bytes(make_tar({"x.png": PNG, "x.txt": caption.encode()}).getvalue())
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(sample, Sample) and sample.caption == "a cat"
    assert sample.more_captions == (("on a mat, 猫 и кот 👩‍👩‍👧", 1.0),)


def test_build_dataset_names_rejected_captions(tmp_path):
    files = {f"{k:02d}.png": PNG for k in range(30)} | {"05.txt": b"\x1b]0;owned\xff"}
    (tmp_path / "a.tar").write_bytes(make_tar(dict(sorted(files.items()))).getvalue())
    path = str(tmp_path / "a.tar")
    config = DataConfig(source="webdataset", path=path, image_size=4, labels=False, captions=True, holdout=0.3)
    with pytest.raises(TooManyUnreadable, match="1 of 30 .*a.tar: 05") as caught:
        build_dataset(config, tmp_path / "out", Workspace.at(tmp_path / "work"))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", os.fsdecode(b"caf\xe9")])
def test_list_class_names_rejects_unprintable_names(tmp_path, name):
    write(tmp_path / "good" / "a.png")
    write(tmp_path / name / "a.png")
    with pytest.raises(UnprintableName) as caught:
        list_class_names(tmp_path)
    assert str(caught.value).isprintable()


def test_read_image_tree_skips_pipes_loops_and_huge_files(tmp_path):
    write(tmp_path / "a" / "good.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "loop.png").symlink_to("loop.png")
    (tmp_path / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no")
    with (tmp_path / "a" / "huge.png").open("wb") as file:
        file.truncate(MAX_SAMPLE_BYTES + 1)
    images = list(read_image_tree(tmp_path, ("a",)))
    reasons = {image.key: image.reason for image in images if isinstance(image, Unreadable)}
    assert [image.key for image in images if isinstance(image, Sample)] == ["a/good%2Epng"]
    assert reasons["a/pipe%2Epng"] == "it is not a plain file" and "at most" in reasons["a/huge%2Epng"]
    assert set(reasons) == {"a/pipe%2Epng", "a/huge%2Epng", "a/caf%E9%2Epng", "a/loop%2Epng"}


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def plant(folder: Path, name: str, evidence: Path) -> None:
    (folder / name).write_bytes(pickle.dumps({"a": Evil(evidence)}))


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin", "x.dat"])
def test_load_expert_never_runs_a_pickle(tmp_path, name):
    folder, evidence = make_expert(tmp_path / "expert", 0), tmp_path / "evidence"
    (folder / WEIGHTS).unlink()
    plant(folder, name, evidence)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": name}}
    write_json(folder / f"{WEIGHTS}.index.json", index)
    with pytest.raises(CorruptArtifact, match="does not hold a complete ResidualMLP"):
        Expert.load(folder)
    assert not evidence.exists()


def test_load_expert_ignores_index_of_other_files(tmp_path):
    folder, elsewhere = make_expert(tmp_path / "expert", 0), tmp_path / "elsewhere.dat"
    torch.save(load_file(folder / WEIGHTS), elsewhere)
    before = Expert.load(folder).model.state_dict()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(before, "../elsewhere.dat")}
    write_json(folder / f"{WEIGHTS}.index.json", index)
    elsewhere.unlink()
    assert all(torch.equal(value, before[name]) for name, value in Expert.load(folder).model.state_dict().items())


def test_load_ensemble_never_runs_a_pickle(parts):  # noqa: F811
    put_together(parts)
    plant(parts / "pipeline" / "expert_1", WEIGHTS, parts / "evidence")
    with pytest.raises(ArtifactError, match="expert_1"):
        EnsemblePipeline.from_pretrained(parts / "pipeline")
    plant(parts / "trained_0", "adapter.pkl", parts / "evidence")
    with pytest.raises(PipelineError, match="adapter.pkl"):
        assemble({0: parts / "trained_0"}, None, parts / "codec", parts / "mono")
    assert not (parts / "evidence").exists() and not (parts / "mono").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_load_expert_rejects_missing_or_extra_weights(tmp_path, change):
    """diffusers would initialize a missing parameter at random and only log it."""
    folder = make_expert(tmp_path / "expert", 0)
    tensors = load_file(folder / WEIGHTS)
    if change != "extra":
        value = tensors.pop("exit.bias")
    if change != "missing":
        tensors["exit.biaz"] = torch.zeros(1) if change == "extra" else value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CorruptArtifact, match="exit.bia"):
        Expert.load(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"_class_name": "os.system"}, "class 'os.system'"),
        ("config.json", {"_class_name": ["a"]}, "network of class"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "does not take: auto_map"),
        ("config.json", {"trust_remote_code": True}, "does not take: trust_remote_code"),
        ("config.json", {"quantization_config": {"quant_method": "x"}}, "does not take: quantization_config"),
        ("config.json", {"width": "x"}, "does not hold a complete ResidualMLP"),
        ("config.json", {"width": 10**9}, "does not hold a complete ResidualMLP"),
        ("expert.json", {"prediction": "os.system"}, "os.system"),
        ("expert.json", {"latent_shape": 5}, "ExpertMetadata.latent_shape"),
    ],
)
def test_load_expert_rejects_foreign_code_and_keys(tmp_path, file, change, message):
    folder = make_expert(tmp_path / "expert", 0)
    write_json(folder / file, read_json(folder / file) | change)
    with pytest.raises(CorruptArtifact, match=message):
        Expert.load(folder)


@pytest.mark.parametrize("text", ["[]", "7", '{"_class_name": "RouterMLP"', "[" * 100_000])
def test_load_rejects_json_that_is_no_object(parts, text):  # noqa: F811
    for path, load in (
        (parts / "trained_0" / "config.json", Expert.load),
        (parts / "trained_1" / "expert.json", Expert.load),
        (parts / "trained_router" / "router.json", Router.load),
        (parts / "codec" / "codec.json", load_codec),
    ):
        path.write_text(text)
        with pytest.raises(CorruptArtifact, match=path.parent.name):
            load(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "evil"}, "evil"), ({"kind": ["mlp"]}, "router.json"), ({"prior_counts": [1, 2, 3]}, "shape")],
)
def test_load_router_rejects_invalid_description(parts, change, message):  # noqa: F811
    file = parts / "trained_router" / "router.json"
    write_json(file, read_json(file) | change)
    with pytest.raises(CorruptArtifact, match=message):
        Router.load(file.parent)


def test_publish_and_assemble_reject_links(parts):  # noqa: F811
    """A copy, or a transfer to an island, would include any file of this machine."""
    (parts / "secret").write_text("secret")
    (parts / "trained_0" / "notes.txt").symlink_to(parts / "secret")
    with pytest.raises(CorruptArtifact, match="notes.txt is a link"):
        put_together(parts)

    def fill(out: Path) -> float:
        (out / "linked").symlink_to(parts)
        return 0.0

    with pytest.raises(CorruptArtifact, match="linked is a link"):
        publish(parts / "artifact", fill, stage="s", config={}, inputs={})
    assert not (parts / "pipeline").exists() and not (parts / "artifact").exists()


HOSTILE_OVERRIDES = [
    "_target_=os.system",
    "+x._target_=os.system",
    "+compute.slurm._target_=os.system",
    "+data={_target_: os.system}",
    "+data={'_target_' : os.system}",
    "hydra.launcher._target_=os.system",
    "+hydra.callbacks.x._target_=os.system",
    "+hydra.callbacks.x={_target_: os.mkdir, path: EVIDENCE}",
    "hydra.searchpath=[file:///tmp]",
    "+hydra.searchpath=[pkg://os]",
    "hydra/job_logging=custom",
    "hydra.job_logging.handlers={x: {'()': os.system}}",
    "hydra.run.dir=/etc",
    "~hydra",
    "name=${oc.env:HOME}",
    "data.path=${ oc.env :HOME}",
    "name=${oc.decode:1}",
    "name=${oc.${seed}:HOME}",
    "+x=[{y: '${oc.env:HOME}'}]",
]


@pytest.mark.parametrize("override", HOSTILE_OVERRIDES)
@pytest.mark.parametrize("many", [False, True])
def test_compose_rejects_calls_and_lookups_in_overrides(tmp_path, override, many):
    override = override.replace("EVIDENCE", str(tmp_path / "evidence"))
    with pytest.raises(ConfigError) as caught:
        if many:
            run_sweep(["partition.num_experts=1,2", override])
        else:
            parse_config(compose([override]))
    assert override.partition("=")[0].lstrip("+~") in str(caught.value)
    assert str(Path.home()) not in str(caught.value).replace(str(config_folder()), "")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize(
    "override", ["folder=/a/${name}", "data.path=s3://b/{0..9}.tar", "data.path=/odd/_target_/x", "name=a.b=c"]
)
def test_compose_accepts_harmless_overrides(override):
    key, _, value = override.partition("=")
    composed = compose([*(["data=image_folder"] if "path" in key else []), override])
    assert str(composed["data"]["path"] if "path" in key else composed[key]) == value.replace("${name}", "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_target_: os.system", "_target_"),
        ("data: {_target_: os.system}", "data._target_"),
        ("compute: {slurm: {_target_: os.system}}", "compute.slurm._target_"),
        ("name: ${oc.env:HOME}", "name"),
        ("data: {path: 'x${oc.env:HOME}'}", "data.path"),
    ],
)
def test_compose_rejects_calls_and_lookups_in_yaml(tmp_path, monkeypatch, text, message):
    for group in Path(config_folder()).iterdir():
        (tmp_path / group.name).symlink_to(group)
    (tmp_path / "experiment").unlink()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    monkeypatch.setattr("orchestrator.config.hydra_compose.config_folder", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        parse_config(compose(["experiment=evil"]))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [EVIDENCE]",
        "format: 2\n_target_: os.system",
        "format: 2\nname: {_target_: x}",
        "- 7",
        "a: [",
    ],
)
def test_load_config_rejects_hostile_yaml(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text.replace("EVIDENCE", str(tmp_path / "evidence")))
    with pytest.raises(OrchestratorError):
        RunFolder(tmp_path).load_config()
    assert not (tmp_path / "evidence").exists()
