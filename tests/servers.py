"""Local servers that stand in for public ones: HTTP, and the storage of Amazon and Google."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

BUCKET = "volumes"


class Folder(SimpleHTTPRequestHandler):
    """The files of the server's folder."""

    def __init__(self, request: Any, address: Any, server: Any) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *_: Any) -> None:
        pass


class Objects(BaseHTTPRequestHandler):
    """What Google Cloud Storage answers when objects are read: its JSON API; a bucket is a folder in the server's."""

    def do_GET(self) -> None:
        bucket, _, name = self.path.partition("?")[0].removeprefix("/storage/v1/b/").partition("/o/")
        file = self.server.folder / bucket / unquote(name)  # type: ignore[attr-defined]
        found = file.is_file()
        content = file.read_bytes() if found else b"{}"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the default, 5, a volume's chunks wait a second for their connections

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder


@contextmanager
def serving(folder: Path, handler: type[BaseHTTPRequestHandler] = Folder) -> Iterator[str]:
    """Gives the address."""
    with Server(folder, handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def local_s3() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Address of a local S3, and a function that puts a folder into BUCKET, under its own name."""
    boto3 = pytest.importorskip("boto3", reason="a local S3 needs boto3 and moto[server]")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket=BUCKET, ACL="public-read")

    def put(folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                key = str(file.relative_to(folder.parent))
                client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes(), ACL="public-read")

    yield f"http://{host}:{port}", put
    server.stop()
