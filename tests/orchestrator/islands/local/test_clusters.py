"""Local islands: real Ray clusters on loopback, each killed, frozen and started again without the other's notice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from typer.testing import CliRunner

from orchestrator.cli.islands import app
from orchestrator.config.compute import ResourcesConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.islands.local.clusters import FIRST_PORT, LISTED, LocalIslands, overrides
from orchestrator.islands.local.processes import MARK, kill_marked, marked_processes
from orchestrator.islands.local.ray_head import BLOCK, Head, free_blocks
from orchestrator.run.lease import process_start
from tests.orchestrator.islands.sockets import listeners

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def run(islands, name, wheel, code, submission_id) -> IslandClient:
    """Submit a line of Python to an island."""
    client = IslandClient(name, islands.configs[name])
    client.submit(submission_id, ["python", "-c", code], wheel=wheel, resources=ResourcesConfig(), env={}, grace_s=1.0)
    return client


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def alive(processes):
    return [pid for pid in processes if process_start(pid) is not None]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def scratch_of(folder, name="island_1") -> Path:
    return Path(json.loads((folder / name / "island.json").read_text())["scratch"])


def test_a_job_has_our_code_and_none_of_our_environment(islands, wheel):
    code = (
        "import json, os, sys, orchestrator.islands.layout as ours; names = ('HOME', 'TMPDIR', 'PYTHONPATH')\n"
        "print('SAID', json.dumps([ours.__file__, sys.executable, *(os.environ[name] for name in names)]))"
    )
    client = run(islands, "island_1", wheel, code, "whoami")
    wait_for(lambda: client.states()["whoami"].has_ended)
    said = next(line for line in client.log("whoami").splitlines() if line.startswith("SAID"))
    ours, python, *places = json.loads(said.removeprefix("SAID"))
    scratch = scratch_of(islands.folder)
    assert all(Path(place).is_relative_to(scratch) for place in (ours, *places))
    assert Path(python).parent == Path(sys.executable).parent
    client.delete("whoami")


def test_the_islands_have_their_own_token_that_nobody_else_can_read(islands):
    files = [Path(config.token_file) for config in islands.configs.values()]
    tokens = [file.read_text() for file in files]
    assert len(set(tokens)) == 2 and all(len(bytes.fromhex(token)) >= 32 for token in tokens)
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o077 == 0


def test_they_listen_on_loopback_only_and_share_no_port(islands):
    found = {name: listeners(islands.processes(name)) for name in islands.configs}
    assert all(len(sockets) >= 8 for sockets in found.values())
    assert [listener for sockets in found.values() for listener in sockets if not listener.is_loopback] == []
    one, two = ({listener.port for listener in sockets} for sockets in found.values())
    assert not one & two


def test_every_process_carries_the_mark_so_that_orphans_are_found(islands):
    marked = f"{MARK}={islands.folder / 'island_1'}\0".encode()
    processes = islands.processes("island_1")
    assert len(processes) > 10
    assert [command_of(pid) for pid in processes if marked not in Path(f"/proc/{pid}/environ").read_bytes()] == []


def test_a_killed_island_is_gone_with_its_jobs_and_comes_back_as_it_was(islands, wheel):
    detached = "subprocess.Popen(['sleep', '900'], start_new_session=True)"
    client = run(islands, "island_1", wheel, f"import subprocess; {detached}; print('up'); input()", "victim")
    wait_for(lambda: "up" in client.log("victim"))
    before, other = islands.configs["island_1"], islands.processes("island_2")
    victims = islands.processes("island_1")
    assert any(command_of(pid).startswith("sleep") for pid in victims)
    started = time.monotonic()
    islands.kill("island_1")
    assert time.monotonic() - started < 5.0
    assert not alive(victims) and islands.processes("island_1") == []
    with pytest.raises(requests.ConnectionError):
        requests.get(before.address, timeout=2)
    islands.start("island_1")
    assert islands.configs["island_1"] == before
    assert client.states() == {} and islands.processes("island_2") == other


def test_a_frozen_island_does_not_answer_and_thaws(islands):
    address = islands.configs["island_2"].address
    islands.freeze("island_2")
    try:
        with pytest.raises(requests.Timeout):
            requests.get(address, timeout=0.5)
    finally:
        islands.thaw("island_2")
    assert requests.get(address, timeout=10).ok


def test_islands_end_when_their_owner_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.islands.local.clusters import LocalIslands\n"
        "with LocalIslands(Path(sys.argv[1]), count=1): print('up', flush=True); time.sleep(900)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    processes = marked_processes(str(tmp_path / "island_1"))
    scratch = scratch_of(tmp_path)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: not (tmp_path / "island_1" / "island.json").exists())
    assert len(processes) > 5
    assert_gone(tmp_path, processes, scratch)


def test_islands_outlive_their_starter_remember_and_are_stopped_by_command(tmp_path, wheel):
    code = (
        "import sys; from pathlib import Path; from orchestrator.islands.local.clusters import LocalIslands\n"
        "from tests.orchestrator.islands.local.test_clusters import run, wait_for\n"
        "islands = LocalIslands(Path(sys.argv[1]), 1, is_durable=True, environment={'STORAGE_KEY': 'for jobs'}).up()\n"
        "printed = 'import os; print(os.environ[\"STORAGE_KEY\"])'\n"
        "client = run(islands, 'island_1', Path(sys.argv[2]), printed, 'told')\n"
        "wait_for(lambda: client.states()['told'].has_ended)\n"
        "islands.kill('island_1'); islands.start('island_1')\n"
        "state = client.states()['told']; print(state.status, client.log('told'), islands.processes('island_1'))"
    )
    command = CliRunner()
    try:
        words = [sys.executable, "-c", code, str(tmp_path), str(wheel)]
        said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout
        processes, scratch = marked_processes(str(tmp_path / "island_1")), scratch_of(tmp_path)
        assert said.startswith("SUCCEEDED") and "for jobs" in said and len(processes) > 5
        ports = [listener.port for listener in listeners(processes)]
        refused = command.invoke(app, ["up", "--folder", str(tmp_path)])
        assert isinstance(refused.exception, IslandError) and "ddm islands down --folder" in str(refused.exception)
        with pytest.raises(IslandError, match="island_1 in .* running already"), LocalIslands(tmp_path):
            pass
        assert marked_processes(str(tmp_path / "island_1")) == processes
    finally:
        ended = command.invoke(app, ["down", "--folder", str(tmp_path)])
    assert ended.exit_code == 0 and "island_1 ended" in ended.output
    assert_gone(tmp_path, processes, scratch)
    assert len(ports) >= 8 and free_blocks(1, min(ports)) == [min(ports)]
    assert isinstance(command.invoke(app, ["down", "--folder", str(tmp_path)]).exception, IslandError)


def assert_gone(folder: Path, processes: list[int], scratch: Path):
    """No process, no temporary file, no shared memory, no token; what was stored is still there."""
    assert marked_processes(str(folder / "island_1")) == []
    assert not alive(processes)
    assert not scratch.exists()
    assert sorted(path.name for path in (folder / "island_1").iterdir()) == ["head.log", "storage"]
    assert not [path for path in Path("/dev/shm").glob("*plasma*") if path.stat().st_mtime > folder.stat().st_mtime]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("cpus", [1, 2])
def test_the_printed_overrides_are_the_islands(tmp_path, count, cpus):
    started = LocalIslands(tmp_path, count=count, cpus=cpus, first_port=FIRST_PORT)
    for number in range(count):
        started._heads[f"island_{number + 1}"] = started._new_head(f"island_{number + 1}", FIRST_PORT + number * BLOCK)
    composed = parse_config(compose(overrides(started.configs, is_usual=False)))
    CliRunner().invoke(app, ["down", "--folder", str(tmp_path)])
    assert composed.compute.islands == started.configs


def test_the_listed_islands_are_the_usual_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    listed = parse_config(compose(["compute=islands_local"])).compute.islands
    assert tuple(listed) == LISTED
    for number, (name, island) in enumerate(listed.items()):
        assert island.address == f"http://127.0.0.1:{FIRST_PORT + number * BLOCK + 1}"
        assert island.storage == str(tmp_path / ".ddm" / "islands" / name / "storage")
        assert Path(island.token_file).expanduser() == tmp_path / ".ddm" / "islands" / name / "token"


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    dies = [sys.executable, "-c", "print('the object store is too small'); raise SystemExit(1)"]
    monkeypatch.setattr(Head, "command", lambda head: dies)
    with pytest.raises(IslandError, match="island_1 has not started.*object store is too small"):
        LocalIslands(tmp_path, count=1).up()
    assert [path.name for path in (tmp_path / "island_1").iterdir() if path.name not in ("head.log", "storage")] == []


def test_ports_that_are_taken_are_named(tmp_path):
    first = free_blocks(1, None)[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 42))
        with pytest.raises(IslandError, match=f"from {first} to {first + BLOCK - 1}"):
            LocalIslands(tmp_path, count=1, first_port=first).up()


def test_only_marked_processes_are_killed_not_their_neighbours(tmp_path):
    """A process of the same session and the same parent, without the mark, lives on."""
    mark = str(tmp_path / "island_1")
    code = "import subprocess, time; subprocess.Popen(['/bin/sleep', '900'], env={}); time.sleep(900)"
    marked = subprocess.Popen([sys.executable, "-c", code], env={MARK: mark})
    neighbour = subprocess.Popen(["sleep", "900"], env={MARK: f"{mark}0"})
    try:
        wait_for(lambda: len(marked_processes(mark)) == 2)
        kill_marked(mark)
        assert marked.wait() == -signal.SIGKILL and neighbour.poll() is None
    finally:
        for process in (marked, neighbour):
            process.kill()
            process.wait()
        kill_marked(mark)
