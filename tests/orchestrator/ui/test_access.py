"""Who may see the page: loopback names without a token, everybody who knows it with one."""

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from orchestrator.cli.app import app as command
from orchestrator.ui.facts.catalog import RunCatalog
from orchestrator.ui.server import create_app

TOKEN = "0123456789abcdef"


def client(folder, token="", base="http://127.0.0.1:8421") -> TestClient:
    return TestClient(create_app(RunCatalog([folder]), token), base_url=base, follow_redirects=False)


def test_website_that_points_its_name_here_reads_nothing(tmp_path):
    assert client(tmp_path).get("/").status_code == 200
    assert client(tmp_path, base="http://[::1]:8421").get("/").status_code == 200
    answer = client(tmp_path, base="http://evil.example:8421").get("/")
    assert answer.status_code == 403 and "not a name of this machine" in answer.text


def test_token_is_entered_once_and_not_kept_in_the_browser(tmp_path):
    page = client(tmp_path, TOKEN, "http://runs.example")
    for path in ("/", "/run/x", "/run/x/events", "/run/x/curves.json", "/compare"):
        assert page.get(path).status_code == 401, path
    assert page.post("/login", data={"token": TOKEN[:-1]}).status_code == 401
    answer = page.post("/login", data={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert page.get("/").status_code == 200
    page.cookies.clear()
    assert page.get("/", headers={"Cookie": "ddm_ui=" + 64 * "0"}).status_code == 401
    assert page.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_large_form_is_refused(tmp_path):
    assert client(tmp_path, TOKEN).post("/login", data={"token": "x" * 5000}).status_code == 413


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_page_only_reads(tmp_path, method):
    assert client(tmp_path).request(method, "/").status_code == 405


@pytest.mark.parametrize("path", ["/", "/static/ui.js", "/nowhere", "/run/none"])
def test_every_answer_forbids_inline_scripts_and_other_hosts(tmp_path, path):
    policy = client(tmp_path).get(path).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "http" not in policy


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--host", "0.0.0.0"], "can be reached by other machines: add --token-file"),  # noqa: S104
        (["--host", "0.0.0.0", "--token-file", "absent"], "the token of the page cannot be read"),  # noqa: S104
        (["--host", "203.0.113.7", "--token-file", "token"], "203.0.113.7:8421 cannot be listened on"),
        (["absent"], "absent is not a folder"),
    ],
)
def test_command_explains_what_it_refuses(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text(TOKEN)
    result = CliRunner().invoke(command, ["ui", *words])
    assert result.exit_code and reason in str(result.exception)
