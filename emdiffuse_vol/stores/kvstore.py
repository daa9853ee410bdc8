"""Where the bytes of a Zarr live: a local folder or a URL (http, https, s3, gs), through tensorstore.

Convention: a *url* names a folder, without a trailing slash; keys are relative to it. Errors of tensorstore, which all
are ``ValueError``, leave this package as ours, one line long.

s3:// is asked with the credentials that the environment or ~/.aws hold, without any where they hold none, as public
buckets want it; AWS_ENDPOINT_URL names another server than Amazon's, as for other programs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tensorstore as ts

from emdiffuse_vol.errors import InputError

# Shard indices and the chunks that neighbouring blocks share; bounded, so that memory does not grow with the volume.
CACHE_BYTES = 64 << 20

AWS_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)

# tensorstore's default is 32 attempts over many minutes: a wrong address would look like a hang.
RETRIES = {"max_retries": 6, "initial_delay": "0.2s", "max_delay": "5s"}


def is_remote(url: str) -> bool:
    return "://" in url


def absolute(url: str | os.PathLike[str]) -> str:
    """A url that means the same in another process, whatever its working directory."""
    text = os.fspath(url).removeprefix("file://")
    return text.rstrip("/") if is_remote(text) else os.path.abspath(text)


def kvstore(url: str, path: str = "") -> dict[str, Any] | str:
    """Spec of the folder ``path`` below ``url``."""
    folder = "/".join([absolute(url), *filter(None, path.split("/"))]) + "/"
    if folder.startswith("s3://"):
        return _s3(folder)
    return folder if is_remote(folder) else {"driver": "file", "path": folder}


def _s3(folder: str) -> dict[str, Any]:
    bucket, _, path = folder.removeprefix("s3://").partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    # Where there are none, the search for them ends at the metadata service of a machine that may be none of Amazon's:
    # minutes of silence.
    if not (any(map(os.environ.get, AWS_CREDENTIALS)) or (Path.home() / ".aws/credentials").is_file()):
        spec["aws_credentials"] = {"type": "anonymous"}
    return spec


def inside(name: str, path: Any) -> str:
    """A path that the metadata of ``name`` give for something of its own. Raises InputError where it leads outside."""
    parts = path.split("/") if isinstance(path, str) else [".."]
    if ".." in parts or "\0" in path or path.startswith("/") or "://" in path:
        raise InputError(f"{name} refers to {path!r}, expected a path below it; correct its metadata")
    return "/".join(part for part in parts if part not in ("", "."))


def context(cache_bytes: int = CACHE_BYTES, threads: int | None = None) -> ts.Context:
    """threads: limit on decoding and on file reads at a time; None leaves tensorstore's own (the number of cores)."""
    limit = {} if threads is None else {"limit": threads}
    resources: dict[str, Any] = {"cache_pool": {"total_bytes_limit": cache_bytes}}
    resources |= dict.fromkeys(("http_request_retries", "s3_request_retries", "gcs_request_retries"), RETRIES)
    if limit:
        resources |= {"data_copy_concurrency": limit, "file_io_concurrency": limit}
    return ts.Context(resources)


def read_json(url: str, key: str) -> dict[str, Any] | None:
    """A JSON object, None when there is no such key. Raises InputError when it cannot be read or understood."""
    try:
        found = ts.KvStore.open(kvstore(url), context=context()).result().read(key).result()
    except ValueError as error:
        # Buckets that may not be listed refuse what is not there.
        if str(error).startswith("NOT_FOUND") or (is_remote(url) and str(error).startswith("PERMISSION_DENIED")):
            return None
        raise InputError(f"{url}/{key} cannot be read: {reason(error)}") from error
    if found.state != "value":
        return None
    try:
        content = json.loads(found.value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url}/{key} is not JSON ({error}); copy it again from its source") from error
    if not isinstance(content, dict):
        raise InputError(f"{url}/{key} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_json(url: str, key: str, content: dict[str, Any]) -> None:
    """Written whole or not at all, and on disk when this returns. Raises ValueError as tensorstore does."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    ts.KvStore.open(kvstore(url)).result().write(key, text.encode()).result()


def reason(error: Exception) -> str:
    """tensorstore's message without its trailing dump of specs."""
    return " ".join(str(error).split(" [")[0].split())


def bytes_read() -> int:
    """Bytes that this process has read through tensorstore, from files and over the network, as they are stored."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    return sum(int(m["values"][0]["value"]) for m in metrics if m["name"].endswith("/bytes_read"))
