"""Files of weights over http and https, verified before anybody can use them.

Convention. A URL may carry the SHA-256 of its file as ``#sha256=HEX``. A download has a temporary name until it is
whole, verified and on disk; one that was cut off never gets another.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import Request, urlopen

from emdiffuse_vol.errors import WeightsError

PIECE = 1 << 20
PATIENCE = 60  # seconds without a byte

Notify = Callable[[int, int | None], None]  # bytes so far, of how many (None: not known)


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def split_checksum(text: str) -> tuple[str, str | None]:
    """``URL#sha256=HEX`` -> URL, HEX or None. Raises WeightsError for what is neither."""
    try:
        url, fragment = urldefrag(text)
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if not host:
        raise WeightsError(f"weights {text} are no URL; expected such as https://host/file.pth#sha256=HEX")
    key, _, value = fragment.partition("=")
    if fragment and key != "sha256":
        raise WeightsError(f"weights {url} are followed by #{fragment}; expected #sha256=HEX")
    return url, checked_hex(value) if fragment else None


def checked_hex(text: str) -> str:
    """A SHA-256 in lower case. Raises WeightsError."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise WeightsError(f"{text!r} is no SHA-256; expected 64 hexadecimal digits, as sha256sum prints them")
    return text.lower()


def file_name(url: str) -> str:
    """The last part of a URL's path, without what a file's name should not hold."""
    last = unquote(urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".") or "weights"


def public(url: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, sha256: str | None, notify: Notify | None = None) -> str:
    """Fetch a file to ``path``. Returns its SHA-256. Raises WeightsError where it cannot be had whole, or is another
    than ``sha256`` says; then nothing is left behind."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            digest = hashlib.sha256()
            for piece in _pieces(url, notify):
                file.write(piece)
                digest.update(piece)
            found = digest.hexdigest()
            if sha256 not in (None, found):
                raise WeightsError(
                    f"weights {public(url)} have SHA-256 {found}, expected {sha256}; the file is not used"
                )
            file.flush()
            os.fsync(file.fileno())
        _appear(part, path)
    finally:
        part.unlink(missing_ok=True)
    return found


def _pieces(url: str, notify: Notify | None) -> Iterator[bytes]:
    """All bytes of a URL. What goes wrong in here is the network's fault, so a full disk is not mistaken for it."""
    done = 0
    try:
        with urlopen(Request(url, headers={"User-Agent": "emdvol"}), timeout=PATIENCE) as response:
            said = response.headers.get("Content-Length", "")
            total = int(said) if said.isdecimal() else None
            while piece := response.read(PIECE):
                yield piece
                done += len(piece)
                if notify:
                    notify(done, total)
    except HTTPError as error:
        raise WeightsError(f"weights {public(url)} cannot be had: {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise WeightsError(f"weights {public(url)} cannot be had: {reason}; try again") from error
    if total is not None and done != total:
        raise WeightsError(f"weights {public(url)} were cut off after {done:,} of {total:,} bytes; try again")


def write_durably(path: Path, content: bytes) -> None:
    """A file that appears whole, or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _appear(Path(name), path)
    finally:
        Path(name).unlink(missing_ok=True)


def _appear(part: Path, path: Path) -> None:
    """Give a file that is on disk its name. Others may read it, as far as its folder lets them."""
    part.chmod(0o644)
    os.replace(part, path)
    with suppress(OSError):  # not every file system lets a folder be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
