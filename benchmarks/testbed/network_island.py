"""One island in a network namespace: `ip netns exec NAME python -m benchmarks.testbed.network_island FOLDER HOST`.

All servers listen inside the namespace: the Ray cluster on its loopback, its S3 storage and a tunnel to its dashboard
on HOST, the only address that the controller can reach. The process prints the island's configuration and runs until
its standard input closes.
"""

import json
import logging
import os
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

from moto.server import ThreadedMotoServer

from ddm_core.artifacts import to_jsonable
from orchestrator.islands.local.clusters import LocalIslands

S3_PORT, TUNNEL_PORT = 9300, 9301
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def main() -> None:
    """Start storage, island and tunnel; print the island's configuration; wait for the end of the input."""
    folder, host = Path(sys.argv[1]), sys.argv[2]
    os.environ.update(CREDENTIALS)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    storage = ThreadedMotoServer(host, S3_PORT, verbose=False)
    storage.start()
    endpoint = f"http://{host}:{S3_PORT}"
    _make_bucket(endpoint)
    options = {"endpoint_url": endpoint}
    islands = LocalIslands(folder, 1, 1, "s3://islands", options, environment=CREDENTIALS)
    with islands:
        config = islands.configs["island_1"]
        _start_tunnel(host, int(config.address.rpartition(":")[2]))
        tunneled = replace(config, address=f"http://{host}:{TUNNEL_PORT}", plain_http=True)
        print(json.dumps(to_jsonable(tunneled)), flush=True)
        sys.stdin.read()
    storage.stop()


def _make_bucket(endpoint: str) -> None:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=endpoint).mkdir("islands")


def _start_tunnel(host: str, port: int) -> None:
    """Forward connections to HOST to a port on loopback."""
    listener = socket.create_server((host, TUNNEL_PORT))

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_copy_bytes, args=(source, target), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _copy_bytes(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        target.close()


if __name__ == "__main__":
    main()
