"""Bytes of a pipeline: of what it is loaded from, and of nothing that records how it was made."""

from ensemble.compression.measurement import RECORDS, model_bytes


def test_records_and_codec_do_not_count(tmp_path):
    for part in ("expert_0", "router", "codec"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "diffusion_pytorch_model.safetensors").write_bytes(bytes(100))
    before = model_bytes(tmp_path)
    for name in RECORDS:
        (tmp_path / "expert_0" / name).write_text("17.25 s")
    assert model_bytes(tmp_path) == before == 200
