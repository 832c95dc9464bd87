"""Requests through fsspec: one file system a process, what is tried again, what is given up.

Enters: URLs and `RemoteConfig`. Leaves: file systems, listings, whole bodies; errors with the URL but not its query or
password.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from data_pipelines.config import MAX_PAUSE_S, RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.shards.names import WEB, public_name
from data_pipelines.shards.web import Stated, check_content

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_QUIET_S = 5.0  # hiccups that pass sooner are nobody's concern
# Of a URL, what stays out of messages: users with their passwords, and the query with its signatures and tokens.
_SECRET = re.compile(r"(?<=://)[^\s'\"/?]*@|\?[^\s'\"]*")
_PASSING = (408, 425, 429)  # and all from 500 on
# What botocore, google.auth and azure say where nobody is logged in, by name, for these packages are optional.
_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOTokenLoadError", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "DefaultCredentialsError", "CredentialUnavailableError", "ClientAuthenticationError",
}  # fmt: skip
_LASTING = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, ValueError, TypeError,
)  # fmt: skip


def is_web(url: str) -> bool:
    """Whether the URL is http or https."""
    return urlsplit(url).scheme in WEB


def filesystem_of(url: str, config: RemoteConfig) -> tuple[Any, str]:
    """The process's file system for `url`, and the path in it.

    Raises:
        ShardError: no plugin of fsspec reads such URLs.
    """
    scheme = urlsplit(url).scheme
    try:
        files = _filesystem("http" if is_web(url) else scheme, config.timeout_s, os.getpid())
    except (ValueError, ImportError) as error:
        raise ShardError(public_name(url), "no_plugin", f"{scheme}:// cannot be read: {error}") from error
    return files, files._strip_protocol(url)


def call(url: str, config: RemoteConfig, method: str, **arguments: Any) -> Any:
    """A method of the file system for `url`, under the deadline where the plugin is asynchronous."""
    files, path = filesystem_of(url, config)
    if files.async_impl:
        arguments["timeout"] = config.timeout_s
    return getattr(files, method)(path, **arguments)


@cache
def _filesystem(scheme: str, timeout_s: float, process: int) -> Any:
    """One file system a scheme and process: connections and event loops do not survive a fork.

    Its parent's stays in this cache of a forked worker on purpose. Dropped there, it would close its sockets and take
    them out of the parent's epoll set, and the parent's next request would wait for ever.
    """
    options: dict[str, Any] = {}
    if scheme == "http":
        import aiohttp

        # Whole shards take longer than aiohttp's five minutes, so the deadline is for each wait on the connection;
        # ranges have their own for the whole request.
        waits = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        # A compressed reply has other ranges and another length than the file.
        plain = {"Accept-Encoding": "identity"}
        options["client_kwargs"] = {"timeout": waits, "trust_env": True, "headers": plain}
    return fsspec.filesystem(scheme, skip_instance_cache=True, **options)


def attempt(request: Callable[[], T], config: RemoteConfig, name: str, give_up: Callable[[str], ShardError]) -> T:
    """The result of `request` to `name`, repeated while what goes wrong may pass.

    Raises:
        ShardError: `give_up(explanation)`, in the end.
    """
    trouble = _Trouble(name, config)
    while True:
        try:
            return request()
        except ShardError:
            raise
        except Exception as error:  # plugins raise what they like
            if not trouble.may_pass(error):
                tries = f" ({trouble.failures} attempts)" if trouble.failures > 1 else ""
                raise give_up(_explain(error) + tries) from error


class _Trouble:
    """What went wrong in a row with one request: whether to go on after a pause, which is told once it takes long."""

    def __init__(self, name: str, config: RemoteConfig) -> None:
        self.failures = 0
        self._name, self._config = name, config
        self._start = time.monotonic()

    def may_pass(self, error: Exception) -> bool:
        """Pause before the next attempt, twice as long each time; False where there is none."""
        self.failures += 1
        if self.failures > self._config.retries or not _is_passing(error):
            return False
        # spread so that processes do not come back together
        pause_s = self._config.backoff_s * 2 ** (self.failures - 1) * random.SystemRandom().uniform(0.5, 1.5)
        pause_s = min(MAX_PAUSE_S, pause_s)
        if time.monotonic() - self._start + pause_s > _QUIET_S:
            left = self._config.retries + 1 - self.failures
            _LOG.warning("%s: %s; again in %.0f s (%d attempts left)", self._name, _explain(error), pause_s, left)
        time.sleep(pause_s)
        return True

    def over(self) -> None:
        """A part of the request succeeded."""
        self.failures, self._start = 0, time.monotonic()


def _cause(error: BaseException) -> BaseException:
    """What fsspec hides behind "file not found": a refused connection, a 503."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    """The server's answer as aiohttp, botocore and gcsfs keep it, also behind what a plugin made of it."""
    while error is not None:
        response = getattr(error, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
        status = getattr(error, "status", metadata.get("HTTPStatusCode"))
        if type(error).__name__ == "HttpError":  # gcsfs
            status = getattr(error, "code", None)
        elif isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # gcsfs, too
            status = 403
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _lacks_credentials(error: BaseException | None) -> bool:
    """Whether it, or what it was made of, says that nobody is logged in."""
    while error is not None:
        if any(kind.__name__ in _CREDENTIALS for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_passing(error: BaseException) -> bool:
    if _lacks_credentials(error):
        return False
    status = _status(error)
    if status is not None:
        return status in _PASSING or status >= 500
    return not isinstance(_cause(error), _LASTING)


def _explain(error: BaseException) -> str:
    cause = _cause(error)
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(cause, 'message', '')}".rstrip()
    words = _SECRET.sub("", f"{type(cause).__name__}: {cause}").rstrip(": ")
    if _lacks_credentials(error):
        words += ". Give credentials as its plugin finds them (s3: AWS_PROFILE or AWS_ACCESS_KEY_ID; gcs: gcloud auth)"
    return words


def list_urls(pattern: str, config: RemoteConfig) -> list[str]:
    """The URLs that a glob matches; on the web, among the links of the folder's page.

    Raises:
        ShardError: the folder cannot be listed.
    """
    files, path = filesystem_of(pattern, config)
    files.invalidate_cache()  # plugins keep listings: this one is to be as of now
    found = attempt(
        lambda: files.glob(path),
        config,
        public_name(pattern),
        lambda error: ShardError(public_name(pattern), "no_shards", f"cannot be listed: {error}"),
    )
    return [url if "://" in url else str(files.unstrip_protocol(url)) for url in found]


def stream_whole(url: str, config: RemoteConfig, offset: int = 0, stated: Stated = ("", "")) -> Iterator[bytes]:
    """The bytes from `offset` on by one plain request; after a cut it begins anew and passes over what came before.

    Raises:
        ShardError: no progress in all attempts; "shard_changed": a web server states another version than `stated`.
    """
    name, position = public_name(url), offset
    trouble = _Trouble(name, config)
    while True:
        try:
            for chunk in _chunks(url, config, position, stated):
                position += len(chunk)
                trouble.over()
                yield chunk
            return
        except ShardError:
            raise
        except Exception as error:
            if not trouble.may_pass(error):
                raise ShardError(name, "read_failed", f"at byte {position}: {_explain(error)}") from error


def _chunks(url: str, config: RemoteConfig, skip: int, stated: Stated) -> Iterator[bytes]:
    """The body of one request, without its first `skip` bytes."""
    files, path = filesystem_of(url, config)
    # Of the web, a plain body (a size spares the question for it, and is not used); of others, their own buffered file.
    plain = {"block_size": 0, "size": 1} if is_web(url) else {}
    with closing(files.open(path, "rb", **plain)) as stream:
        if is_web(url):
            check_content(stream.r.headers, url, stated)
        while chunk := stream.read(config.block_kb << 10):
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(0, skip - len(chunk))
