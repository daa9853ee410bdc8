"""Volumes on this machine for a viewer in a browser: HTTP with range requests and CORS, and nothing but those volumes.

Convention: a volume is at ``http://HOST:PORT/SECRET/NAME/``. Pages of other sites may fetch from this machine, and CORS
lets them read what they get, so the secret, a new one for every server, keeps strangers' pages from the data. Only
files that lie inside the folders given are sent, wherever links point; folders are not listed; nothing can be written.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from emdiffuse_vol.errors import OutputError

LOOPBACK = "127.0.0.1"
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": "Range",
    "Access-Control-Expose-Headers": "Content-Range, Content-Length, Accept-Ranges",
    "Accept-Ranges": "bytes",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Address:
    """Of a server that runs."""

    base: str
    port: int

    def url(self, name: str) -> str:
        """Of a volume, with a slash at the end."""
        return f"{self.base}/{quote(name)}/"


@contextmanager
def serving(folders: Mapping[str, Path], host: str = LOOPBACK, port: int = 0) -> Iterator[Address]:
    """Serve folders under names while the context lasts; port 0 takes a free one. Raises OutputError where the port
    or the host cannot be had."""
    secret = secrets.token_urlsafe(16)
    roots = {name: Path(os.path.realpath(folder)) for name, folder in folders.items()}

    class Handler(_Handler):
        prefix = secret
        volumes = roots

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise OutputError(cannot_listen(host, port, error)) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="emdvol-serving", daemon=True)
    thread.start()
    try:
        yield Address(f"http://{reachable(host)}:{server.server_port}/{secret}", server.server_port)
    finally:
        server.shutdown()
        server.server_close()


def reachable(host: str) -> str:
    """How a browser is to call a host that servers listen on."""
    return socket.getfqdn() if host in ("", "0.0.0.0", "::") else host


def cannot_listen(host: str, port: int, error: OSError) -> str:
    what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror or error}"
    return f"port {port} of {host} {what}; choose another --port (or --host)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    prefix: str
    volumes: Mapping[str, Path]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_OPTIONS(self) -> None:
        self._head(204, {"Content-Length": "0"})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        file = self._open()
        if file is None:  # neuroglancer takes 404 for a chunk that is not there, which is black
            self._head(404, {"Content-Length": "0"})
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            asked = self.headers.get("Range")
            span = byte_range(asked, size) if asked else (0, size)
            if span is None:
                self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
            start, stop = span
            kind = "application/json" if self.path.endswith(".json") else "application/octet-stream"
            headers = {"Content-Length": str(stop - start), "Content-Type": kind}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._head(206 if asked else 200, headers)
            if body:
                file.seek(start)
                self._copy(file, stop - start)

    def _copy(self, file: BinaryIO, left: int) -> None:
        try:
            while left > 0 and (piece := file.read(min(left, 1 << 20))):
                self.wfile.write(piece)
                left -= len(piece)
        except (BrokenPipeError, ConnectionResetError):  # a viewer that has moved on
            left = 0
        if left:  # the file has shrunk: the length that was promised is wrong
            self.close_connection = True

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _open(self) -> BinaryIO | None:
        """The file that is asked for, if it is one of ours."""
        parts = unquote(urlsplit(self.path).path).split("/")
        if len(parts) < 4 or parts[0] or not secrets.compare_digest(parts[1].encode(), self.prefix.encode()):
            return None
        root = self.volumes.get(parts[2])
        if root is None or any(part in ("", ".", "..") or "\0" in part or os.sep in part for part in parts[3:]):
            return None
        path = Path(os.path.realpath(root.joinpath(*parts[3:])))
        try:
            return path.open("rb") if path.is_file() and path.is_relative_to(root) else None
        except OSError:
            return None


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """``bytes=a-b``, ``a-`` or ``-n`` -> half-open range within the file; None where there is no such part. Several
    ranges at once are not answered (RFC 9110, 14.2)."""
    found = RANGE.fullmatch(header.strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    return (start, stop) if start < stop else None
