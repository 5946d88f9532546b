"""`ddm pool`: checks and confirmation before any cost, and an error unless the pool is gone after `down`."""

import json
import stat

import pytest
from typer.testing import CliRunner

from orchestrator.cli.machines.pools import app
from orchestrator.errors import ConfigError
from orchestrator.pools.shell import PoolError, require_library, require_tool, tool_output


def run_pool(*arguments, answer=None):
    """Run a command and return its output; raise its exception."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer, catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture
def kubernetes(tools, tmp_path):
    """Return the arguments of a pool on a Kubernetes that grants all rights."""
    tools.set("kinds", "rayclusters.ray.io\nrayjobs.ray.io\n")
    tools.set("allowed")
    return ("kuberay", f"token_file={tmp_path}/pool/token", "--folder", tmp_path / "pool")


def test_render_prints_every_file_and_writes_none(tmp_path):
    printed = run_pool("render", "kuberay", "nodes.l4.max_nodes=7")
    assert "kind: RayCluster" in printed and "kind: RayJob" in printed and "maxReplicas: 7" in printed
    assert "compute.islands" not in printed and "backend: islands" in printed


def test_render_with_out_writes_files(tmp_path):
    run_pool("render", "aws_spot", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["islands.yaml", "pool.yaml", "security_group.yaml"]


def test_render_of_invalid_override_raises():
    with pytest.raises(ConfigError, match="nodez: unknown key"):
        run_pool("render", "local", "nodez=1")


def test_up_then_down_of_kuberay_leaves_nothing(kubernetes, tools, tmp_path):
    printed = run_pool("up", *kubernetes, answer="y\n")
    assert "The cost of pool kuberay is unknown: no price_per_hour for l4_spot, l4." in printed
    assert "kuberay_l4_spot" in printed and "ddm pool down kuberay --folder" in printed
    token = tmp_path / "pool" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not [call for call in tools.calls if token.read_text() in call]
    assert f"--from-file=auth_token={token}" in " ".join(tools.calls)
    assert "is gone" in run_pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")
    assert not (tmp_path / "pool" / "pool.json").exists()
    assert [call for call in tools.calls if "delete secret" in call]


def test_up_and_down_without_confirmation_do_nothing(kubernetes, tools, tmp_path):
    assert "Aborted" in run_pool("up", *kubernetes, answer="n\n")
    assert not (tmp_path / "pool").exists() and not [call for call in tools.calls if "apply" in call]
    run_pool("up", *kubernetes, "--yes")
    assert "Aborted" in run_pool("down", "kuberay", "--folder", tmp_path / "pool", answer="n\n")
    assert (tmp_path / "pool" / "pool.json").exists()


def test_up_prints_the_price_before_confirmation(tools, tmp_path):
    tools.set("cloud")
    printed = run_pool("up", "skypilot", "--folder", tmp_path, answer="n\n")
    assert "at most 2.32 an hour (head 0, l4_spot 2 × 0.35, l4 2 × 0.81), 0.00 while idle" in printed
    assert printed.index("at most") < printed.index("Start pool skypilot?")


def test_down_lists_remaining_resources_and_can_be_repeated(kubernetes, tools, tmp_path):
    run_pool("up", *kubernetes, "--yes")
    tools.set("stuck")
    with pytest.raises(PoolError, match="not gone: raycluster.ray.io/ddm-kuberay, pod/ddm-kuberay-head; run `ddm pool"):
        run_pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")
    (tools.folder / "stuck").unlink()
    assert "is gone" in run_pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")


def test_pool_that_started_partly_can_be_ended(kubernetes, tools, tmp_path):
    tools.set("full")
    with pytest.raises(PoolError, match="failed with exit code 1.*end what was started with `ddm pool down kuberay`"):
        run_pool("up", *kubernetes, "--yes")
    assert "is gone" in run_pool("down", "kuberay", "--folder", tmp_path / "pool", "--yes")


def test_up_without_kuberay_or_without_rights_raises(kubernetes, tools, tmp_path):
    (tools.folder / "allowed").unlink()
    with pytest.raises(PoolError, match="can-i create rayclusters.ray.io` failed: no; request this right in namespace"):
        run_pool("up", *kubernetes, "--yes")
    (tools.folder / "kinds").unlink()
    with pytest.raises(PoolError, match="install KubeRay"):
        run_pool("up", *kubernetes, "--yes")
    assert not (tmp_path / "pool").exists()


def test_up_with_mutual_tls_refuses_an_operator_without_it(kubernetes, tools, tmp_path):
    with pytest.raises(PoolError, match="does not exist; install KubeRay 1.7 with RayClusterMTLS"):
        run_pool("up", *kubernetes, "kubernetes.mutual_tls=true", "--yes")
    assert not (tmp_path / "pool").exists()
    tools.set("tls")
    run_pool("up", *kubernetes, "kubernetes.mutual_tls=true", "--yes")
    assert "enabled: true" in (tmp_path / "pool" / "ray_cluster.yaml").read_text()


def test_up_then_down_of_skypilot_leaves_nothing(tools, tmp_path):
    with pytest.raises(PoolError, match="may use no cloud; `sky check`"):
        run_pool("up", "skypilot", "--folder", tmp_path, "--yes")
    tools.set("cloud")
    run_pool("up", "skypilot", f"token_file={tmp_path}/token", "--folder", tmp_path, "--yes")
    assert (tools.folder / "launched").read_text().split() == ["ddm-skypilot-l4-spot"]
    tools.set("stuck")
    with pytest.raises(PoolError, match="not gone: ddm-skypilot-l4-spot"):
        run_pool("down", "skypilot", "--folder", tmp_path, "--yes")
    (tools.folder / "stuck").unlink()
    assert "is gone" in run_pool("down", "skypilot", "--folder", tmp_path, "--yes")
    assert "is gone" not in " ".join(tools.calls)


def test_up_without_a_tool_raises_before_any_change(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PoolError, match="`kubectl` is not installed; install it"):
        run_pool("up", "kuberay", "--folder", tmp_path / "pool", "--yes")
    with pytest.raises(PoolError, match="`sky` is not installed; run"):
        run_pool("up", "skypilot", "--folder", tmp_path / "pool", "--yes")
    assert not (tmp_path / "pool").exists()


def test_up_with_token_readable_by_others_raises(kubernetes, tools, tmp_path):
    token = tmp_path / "pool" / "token"
    token.parent.mkdir()
    token.write_text("exposed")
    token.chmod(0o644)
    with pytest.raises(PoolError, match=r"can be read by others \(mode 644\); run `chmod 600"):
        run_pool("up", *kubernetes, "--yes")
    assert not [call for call in tools.calls if "apply" in call]


def test_token_is_created_once(kubernetes, tmp_path):
    run_pool("up", *kubernetes, "--yes")
    first = (tmp_path / "pool" / "token").read_text()
    run_pool("up", *kubernetes, "--yes")
    assert (tmp_path / "pool" / "token").read_text() == first and len(first) == 64


def test_down_of_pool_that_was_not_started_raises(kubernetes, tmp_path):
    run_pool("up", *kubernetes, "--yes")
    with pytest.raises(PoolError, match="no pool was started in .*/other; started pools: pool"):
        run_pool("down", "x", "--folder", tmp_path / "other", "--yes")


def test_up_stores_the_full_configuration(kubernetes, tmp_path):
    run_pool("up", *kubernetes, "nodes.l4.max_nodes=9", "--yes")
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["nodes"]["l4"]["max_nodes"] == 9


def test_failed_tools_raise_with_remedy(tmp_path):
    with pytest.raises(PoolError, match="`sh -c echo no >&2; exit 3` failed: no; think"):
        tool_output([require_tool("sh", ""), "-c", "echo no >&2; exit 3"], remedy="think")
    with pytest.raises(PoolError, match=r"`sleep 9` did not end within 0.1 s"):
        tool_output(["sleep", "9"], timeout_s=0.1)
    with pytest.raises(PoolError, match="library not_there is not installed; get it"):
        require_library("not_there.part", "get it")
