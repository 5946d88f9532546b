"""A proxy that the environment names is for other hosts: calls on this machine never go through it."""

import os
from urllib.parse import urlsplit

import requests

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
"""Names of the variables, which programs read in lower and in upper case."""

LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
"""This machine's own names. Some programs understand networks, others only addresses."""


def bypass_proxies_on_loopback() -> None:
    """Add this machine's own names to `no_proxy` in the environment, if it names a proxy.

    Programs read `no_proxy` or `NO_PROXY`, and the one hides the other, so both get the entries of both.
    """
    if not find_proxy_variables():
        return
    given = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in os.environ.get(name, "").split(",")]
    entries = ",".join(dict.fromkeys(entry for entry in (*given, *LOOPBACK) if entry))
    os.environ.update({"no_proxy": entries, "NO_PROXY": entries})


def find_proxy_variables() -> list[str]:
    """Return the names of the environment's variables that name a proxy; their values may contain passwords."""
    return sorted(name for name, value in os.environ.items() if name.lower() in PROXY_VARIABLES and value)


def describe_proxy(url: str) -> str:
    """Return which variables send a call to this URL through a proxy and what to do; empty if none does."""
    proxies = requests.utils.get_environ_proxies(url, no_proxy=None)
    if requests.utils.select_proxy(url, proxies) is None:
        return ""
    variables = " or ".join(find_proxy_variables())
    return (
        f"; the call goes through the proxy in {variables}: if that is wrong, add {urlsplit(url).hostname} to no_proxy"
    )
