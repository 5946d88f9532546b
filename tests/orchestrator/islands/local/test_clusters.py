"""Local islands: real Ray clusters on loopback, each killed, frozen and restarted without effect on the other."""

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

from orchestrator.cli.machines.islands import app
from orchestrator.config.compute import ResourcesConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.islands.local.clusters import CONFIGURED, FIRST_PORT, LocalIslands, build_overrides
from orchestrator.islands.local.ray_head import BLOCK_SIZE, Head, find_free_blocks
from orchestrator.run.lease import process_start_time
from orchestrator.run.marked_processes import MARK, find_marked_processes, kill_marked_processes
from tests.orchestrator.islands.sockets import list_listeners

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def submit_code(islands, name, wheel, code, submission_id) -> IslandClient:
    """Submit Python code to an island."""
    client = IslandClient(name, islands.configs[name])
    client.submit(submission_id, ["python", "-c", code], wheel=wheel, resources=ResourcesConfig(), env={}, grace_s=1.0)
    return client


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.1)


def list_alive(processes):
    return [pid for pid in processes if process_start_time(pid) is not None]


def read_command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def read_scratch(folder, name="island_1") -> Path:
    return Path(json.loads((folder / name / "island.json").read_text())["scratch"])


def test_job_gets_our_code_but_not_our_environment(islands, wheel):
    code = (
        "import json, os, sys, orchestrator.islands.layout as ours; names = ('HOME', 'TMPDIR', 'PYTHONPATH')\n"
        "print('REPORT', json.dumps([ours.__file__, sys.executable, *(os.environ[name] for name in names)]))"
    )
    client = submit_code(islands, "island_1", wheel, code, "whoami")
    wait_for(lambda: client.list_states()["whoami"].has_ended)
    report = next(line for line in client.fetch_log("whoami").splitlines() if line.startswith("REPORT"))
    module, python, *folders = json.loads(report.removeprefix("REPORT"))
    scratch = read_scratch(islands.folder)
    assert all(Path(path).is_relative_to(scratch) for path in (module, *folders))
    assert Path(python).parent == Path(sys.executable).parent
    client.delete("whoami")


def test_token_of_each_island_differs_and_is_private(islands):
    files = [Path(config.token_file) for config in islands.configs.values()]
    tokens = [file.read_text() for file in files]
    assert len(set(tokens)) == 2 and all(len(bytes.fromhex(token)) >= 32 for token in tokens)
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o077 == 0


def test_islands_listen_on_loopback_without_shared_ports(islands):
    sockets = {name: list_listeners(islands.list_processes(name)) for name in islands.configs}
    assert all(len(listeners) >= 8 for listeners in sockets.values())
    assert [listener for listeners in sockets.values() for listener in listeners if not listener.is_loopback] == []
    first, second = ({listener.port for listener in listeners} for listeners in sockets.values())
    assert not first & second


def test_every_process_of_an_island_has_its_mark(islands):
    variable = f"{MARK}={islands.folder / 'island_1'}\0".encode()
    processes = islands.list_processes("island_1")
    assert len(processes) > 10
    assert [read_command(pid) for pid in processes if variable not in Path(f"/proc/{pid}/environ").read_bytes()] == []


def test_killed_island_ends_its_jobs_and_can_be_restarted(islands, wheel):
    detached = "subprocess.Popen(['sleep', '900'], start_new_session=True)"
    client = submit_code(islands, "island_1", wheel, f"import subprocess; {detached}; print('up'); input()", "victim")
    wait_for(lambda: "up" in client.fetch_log("victim"))
    before, other = islands.configs["island_1"], islands.list_processes("island_2")
    victims = islands.list_processes("island_1")
    assert any(read_command(pid).startswith("sleep") for pid in victims)
    started = time.monotonic()
    islands.kill("island_1")
    assert time.monotonic() - started < 5.0
    assert not list_alive(victims) and islands.list_processes("island_1") == []
    with pytest.raises(requests.ConnectionError):
        requests.get(before.address, timeout=2)
    islands.start("island_1")
    assert islands.configs["island_1"] == before
    assert client.list_states() == {} and islands.list_processes("island_2") == other


def test_frozen_island_times_out_until_it_thaws(islands):
    address = islands.configs["island_2"].address
    islands.freeze("island_2")
    try:
        with pytest.raises(requests.Timeout):
            requests.get(address, timeout=0.5)
    finally:
        islands.thaw("island_2")
    assert requests.get(address, timeout=10).ok


def test_islands_of_killed_owner_end(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.islands.local.clusters import LocalIslands\n"
        "with LocalIslands(Path(sys.argv[1]), count=1): print('up', flush=True); time.sleep(900)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    processes = find_marked_processes(str(tmp_path / "island_1"))
    scratch = read_scratch(tmp_path)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: not (tmp_path / "island_1" / "island.json").exists())
    assert len(processes) > 5
    assert_gone(tmp_path, processes, scratch)


def test_islands_outlive_their_starter_until_down(tmp_path, wheel):
    code = (
        "import sys; from pathlib import Path; from orchestrator.islands.local.clusters import LocalIslands\n"
        "from tests.orchestrator.islands.local.test_clusters import submit_code, wait_for\n"
        "islands = LocalIslands(Path(sys.argv[1]), 1, is_durable=True, environment={'STORAGE_KEY': 'for jobs'}).up()\n"
        "printed = 'import os; print(os.environ[\"STORAGE_KEY\"])'\n"
        "client = submit_code(islands, 'island_1', Path(sys.argv[2]), printed, 'printed')\n"
        "wait_for(lambda: client.list_states()['printed'].has_ended)\n"
        "islands.kill('island_1'); islands.start('island_1')\n"
        "state = client.list_states()['printed']; log = client.fetch_log('printed')\n"
        "print(state.status, log, islands.list_processes('island_1'))"
    )
    runner = CliRunner()
    try:
        arguments = [sys.executable, "-c", code, str(tmp_path), str(wheel)]
        output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout
        processes, scratch = find_marked_processes(str(tmp_path / "island_1")), read_scratch(tmp_path)
        assert output.startswith("SUCCEEDED") and "for jobs" in output and len(processes) > 5
        ports = [listener.port for listener in list_listeners(processes)]
        refused = runner.invoke(app, ["up", "--folder", str(tmp_path)])
        assert isinstance(refused.exception, IslandError) and "ddm islands down --folder" in str(refused.exception)
        with pytest.raises(IslandError, match="island_1 in .* running already"), LocalIslands(tmp_path):
            pass
        assert find_marked_processes(str(tmp_path / "island_1")) == processes
    finally:
        ended = runner.invoke(app, ["down", "--folder", str(tmp_path)])
    assert ended.exit_code == 0 and "island_1 ended" in ended.output
    assert_gone(tmp_path, processes, scratch)
    assert len(ports) >= 8 and find_free_blocks(1, min(ports)) == [min(ports)]
    assert isinstance(runner.invoke(app, ["down", "--folder", str(tmp_path)]).exception, IslandError)


def assert_gone(folder: Path, processes: list[int], scratch: Path):
    """Assert that no process, temporary file, shared memory or token remains, and that the storage does."""
    assert find_marked_processes(str(folder / "island_1")) == []
    assert not list_alive(processes)
    assert not scratch.exists()
    assert sorted(path.name for path in (folder / "island_1").iterdir()) == ["head.log", "storage"]
    assert not [path for path in Path("/dev/shm").glob("*plasma*") if path.stat().st_mtime > folder.stat().st_mtime]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("cpus", [1, 2])
def test_overrides_produce_the_islands(tmp_path, count, cpus):
    started = LocalIslands(tmp_path, count=count, cpus=cpus, first_port=FIRST_PORT)
    for number in range(count):
        started._heads[f"island_{number + 1}"] = started._new_head(
            f"island_{number + 1}", FIRST_PORT + number * BLOCK_SIZE
        )
    composed = parse_config(compose(build_overrides(started.configs, in_default_folder=False)))
    CliRunner().invoke(app, ["down", "--folder", str(tmp_path)])
    assert composed.compute.islands == started.configs


def test_configured_islands_match_the_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    configured = parse_config(compose(["compute=islands_local"])).compute.islands
    assert tuple(configured) == CONFIGURED
    for number, (name, island) in enumerate(configured.items()):
        assert island.address == f"http://127.0.0.1:{FIRST_PORT + number * BLOCK_SIZE + 1}"
        assert island.storage == str(tmp_path / ".ddm" / "islands" / name / "storage")
        assert Path(island.token_file).expanduser() == tmp_path / ".ddm" / "islands" / name / "token"


def test_start_that_fails_reports_why_and_cleans_up(tmp_path, monkeypatch):
    failing = [sys.executable, "-c", "print('the object store is too small'); raise SystemExit(1)"]
    monkeypatch.setattr(Head, "build_command", lambda head: failing)
    with pytest.raises(IslandError, match="island_1 has not started.*object store is too small"):
        LocalIslands(tmp_path, count=1).up()
    assert [path.name for path in (tmp_path / "island_1").iterdir() if path.name not in ("head.log", "storage")] == []


def test_start_with_port_in_use_raises(tmp_path):
    first = find_free_blocks(1, None)[0]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first + 42))
        with pytest.raises(IslandError, match=f"from {first} to {first + BLOCK_SIZE - 1}"):
            LocalIslands(tmp_path, count=1, first_port=first).up()


def test_kill_ends_only_marked_processes(tmp_path):
    """Check that a process of the same session and parent, without the mark, is not killed."""
    mark = str(tmp_path / "island_1")
    code = "import subprocess, time; subprocess.Popen(['/bin/sleep', '900'], env={}); time.sleep(900)"
    marked = subprocess.Popen([sys.executable, "-c", code], env={MARK: mark})
    neighbour = subprocess.Popen(["sleep", "900"], env={MARK: f"{mark}0"})
    try:
        wait_for(lambda: len(find_marked_processes(mark)) == 2)
        kill_marked_processes(mark)
        assert marked.wait() == -signal.SIGKILL and neighbour.poll() is None
    finally:
        for process in (marked, neighbour):
            process.kill()
            process.wait()
        kill_marked_processes(mark)
