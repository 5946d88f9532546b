import os
import subprocess
import sys

import pytest

from orchestrator.errors import ConfigError
from orchestrator.serving.config import Limits, ServiceConfig
from orchestrator.serving.keys import ApiKeys

KEY, OTHER = "a" * 32, "b" * 32


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_of_the_file_is_accepted_and_no_other(tmp_path):
    keys = ApiKeys.read(write(tmp_path / "keys", f"{KEY}\n\n{OTHER}\n"))
    assert keys.accept(f"Bearer {KEY}") and keys.accept(f"bearer {OTHER}")
    refused = ["", KEY, f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer ", f"Bearer {KEY} {KEY}"]
    assert not any(keys.accept(header) for header in refused)
    assert KEY not in repr(keys)


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (KEY, 0o644, "chmod 600"),
        ("\n", 0o600, "no API key"),
        ("short", 0o600, "line 1"),
        (f"{KEY}\n{KEY} {KEY}", 0o600, "line 2"),
    ],
)
def test_a_key_file_that_is_open_or_wrong_is_refused(tmp_path, text, mode, reason):
    with pytest.raises(ConfigError, match=reason):
        ApiKeys.read(write(tmp_path / "keys", text, mode))


def test_a_missing_key_file_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.read(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_an_open_address_needs_keys(host):
    with pytest.raises(ConfigError, match="--keys"):
        ServiceConfig(host=host)
    assert not ServiceConfig(host=host, key_file=os.devnull).is_loopback


def test_a_request_that_never_fits_into_the_queue_is_refused():
    with pytest.raises(ConfigError, match="--queue"):
        ServiceConfig(limits=Limits(images=9, queue=8))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"address": "ray://10.0.0.1:10001"}, "HOST:PORT"), ({"address": "auto", "replicas": None}, "--inline")],
)
def test_an_address_that_cannot_be_used_is_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        ServiceConfig(**fields)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{folder}/missing"], "neither a run nor the folder of an ensemble"),
        (["name={folder}"], "neither a run nor the folder of an ensemble"),
        (["{folder}/run", "--host", "0.0.0.0"], "needs --keys"),
    ],
)
def test_what_cannot_be_served_is_refused_without_torch(tmp_path, words, reason):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    arguments = ["serve", *(word.format(folder=tmp_path) for word in words)]
    code = (
        "import sys; from orchestrator.cli.app import app\n"
        f"try: app({arguments!r}, standalone_mode=False)\n"
        "except Exception as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert reason in done.stdout and done.stdout.endswith("False\n"), done.stdout + done.stderr
