"""`ddm pool`: checks before anything, asks before it costs, and is not done until the pool is gone."""

import json
import stat

import pytest
from typer.testing import CliRunner

from orchestrator.cli.pools import app
from orchestrator.errors import ConfigError
from orchestrator.pools.shell import PoolError, require_library, require_tool, tool_output


def pool(*arguments, says=None):
    """What a command prints; errors come out as they are."""
    ran = CliRunner().invoke(app, [str(argument) for argument in arguments], input=says, catch_exceptions=True)
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return ran.output


@pytest.fixture
def kubernetes(tools, tmp_path):
    """Arguments of a pool on a Kubernetes that lets us."""
    tools.set("kinds", "rayclusters.ray.io\nrayjobs.ray.io\n")
    tools.set("allowed")
    return ("kuberay", f"token_file={tmp_path}/pool/token", "--folder", tmp_path / "pool")


def test_render_prints_every_file_and_writes_none(tmp_path):
    printed = pool("render", "kuberay", "nodes.l4.max_nodes=7")
    assert "kind: RayCluster" in printed and "kind: RayJob" in printed and "maxReplicas: 7" in printed
    assert "compute.islands" not in printed and "backend: islands" in printed


def test_render_into_a_folder(tmp_path):
    pool("render", "aws_spot", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["islands.yaml", "pool.yaml", "security_group.yaml"]


def test_render_names_what_is_wrong():
    with pytest.raises(ConfigError, match="nodez: unknown key"):
        pool("render", "local", "nodez=1")


def test_up_and_down(kubernetes, tools, tmp_path):
    printed = pool("up", *kubernetes, says="y\n")
    assert "What pool kuberay costs is unknown: no price_per_hour for l4_spot, l4." in printed
    assert "kuberay_l4_spot" in printed and "ddm pool down kuberay --folder" in printed
    token = tmp_path / "pool" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not [call for call in tools.calls if token.read_text() in call]
    assert f"--from-file=auth_token={token}" in " ".join(tools.calls)
    assert "is gone" in pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")
    assert not (tmp_path / "pool" / "pool.json").exists()
    assert [call for call in tools.calls if "delete secret" in call]


def test_nothing_happens_without_a_yes(kubernetes, tools, tmp_path):
    assert "Aborted" in pool("up", *kubernetes, says="n\n")
    assert not (tmp_path / "pool").exists() and not [call for call in tools.calls if "apply" in call]
    pool("up", *kubernetes, "--yes")
    assert "Aborted" in pool("down", "kuberay", "--folder", tmp_path / "pool", says="n\n")
    assert (tmp_path / "pool" / "pool.json").exists()


def test_what_it_costs_is_said_before_it_is_asked(tools, tmp_path):
    tools.set("cloud")
    printed = pool("up", "skypilot", "--folder", tmp_path, says="n\n")
    assert "at most 2.32 an hour (head 0, l4_spot 2 × 0.35, l4 2 × 0.81), 0.00 while idle" in printed
    assert printed.index("at most") < printed.index("Start pool skypilot?")


def test_down_says_what_is_left_and_can_be_repeated(kubernetes, tools, tmp_path):
    pool("up", *kubernetes, "--yes")
    tools.set("stuck")
    with pytest.raises(PoolError, match="not gone: raycluster.ray.io/ddm-kuberay, pod/ddm-kuberay-head; run `ddm pool"):
        pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")
    (tools.folder / "stuck").unlink()
    assert "is gone" in pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")


def test_a_pool_that_half_started_can_be_ended(kubernetes, tools, tmp_path):
    tools.set("full")
    with pytest.raises(PoolError, match="failed with exit code 1.*end what was started with `ddm pool down kuberay`"):
        pool("up", *kubernetes, "--yes")
    assert "is gone" in pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")


def test_a_kubernetes_without_kuberay_or_without_our_right(kubernetes, tools, tmp_path):
    (tools.folder / "allowed").unlink()
    with pytest.raises(PoolError, match="can-i create rayclusters.ray.io` failed: no; ask for the right in namespace"):
        pool("up", *kubernetes, "--yes")
    (tools.folder / "kinds").unlink()
    with pytest.raises(PoolError, match="install KubeRay"):
        pool("up", *kubernetes, "--yes")
    assert not (tmp_path / "pool").exists()


def test_skypilot_goes_up_and_down(tools, tmp_path):
    with pytest.raises(PoolError, match="may use no cloud; `sky check`"):
        pool("up", "skypilot", "--folder", tmp_path, "--yes")
    tools.set("cloud")
    pool("up", "skypilot", f"token_file={tmp_path}/token", "--folder", tmp_path, "--yes")
    assert (tools.folder / "launched").read_text().split() == ["ddm-skypilot-l4-spot"]
    tools.set("stuck")
    with pytest.raises(PoolError, match="not gone: ddm-skypilot-l4-spot"):
        pool("down", "skypilot", "--folder", tmp_path, "--yes")
    (tools.folder / "stuck").unlink()
    assert "is gone" in pool("down", "skypilot", "--folder", tmp_path, "--yes")
    assert "is gone" not in " ".join(tools.calls)


def test_a_missing_tool_is_named_before_anything(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PoolError, match="`kubectl` is not installed; install it"):
        pool("up", "kuberay", "--folder", tmp_path / "pool", "--yes")
    with pytest.raises(PoolError, match="`sky` is not installed; run"):
        pool("up", "skypilot", "--folder", tmp_path / "pool", "--yes")
    assert not (tmp_path / "pool").exists()


def test_a_token_that_others_can_read_is_refused(kubernetes, tools, tmp_path):
    token = tmp_path / "pool" / "token"
    token.parent.mkdir()
    token.write_text("seen")
    token.chmod(0o644)
    with pytest.raises(PoolError, match=r"can be read by others \(mode 644\); run `chmod 600"):
        pool("up", *kubernetes, "--yes")
    assert not [call for call in tools.calls if "apply" in call]


def test_a_token_is_made_once(kubernetes, tmp_path):
    pool("up", *kubernetes, "--yes")
    first = (tmp_path / "pool" / "token").read_text()
    pool("up", *kubernetes, "--yes")
    assert (tmp_path / "pool" / "token").read_text() == first and len(first) == 64


def test_down_of_a_pool_that_was_never_up(kubernetes, tmp_path):
    pool("up", *kubernetes, "--yes")
    with pytest.raises(PoolError, match="no pool was started in .*/other; those that were: pool"):
        pool("down", "x", "--folder", tmp_path / "other", "--yes")


def test_the_way_down_is_recorded_in_full(kubernetes, tmp_path):
    pool("up", *kubernetes, "nodes.l4.max_nodes=9", "--yes")
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["nodes"]["l4"]["max_nodes"] == 9


def test_tools_fail_in_words(tmp_path):
    with pytest.raises(PoolError, match="`sh -c echo no >&2; exit 3` failed: no; think"):
        tool_output([require_tool("sh", ""), "-c", "echo no >&2; exit 3"], way_out="think")
    with pytest.raises(PoolError, match=r"`sleep 9` did not end within 0.1 s"):
        tool_output(["sleep", "9"], timeout_s=0.1)
    with pytest.raises(PoolError, match="library not_there is not installed; get it"):
        require_library("not_there.part", "get it")
