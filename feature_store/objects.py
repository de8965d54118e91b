"""Chunks of snapshots in an object store, by fsspec: a bucket, or a folder that all hosts have.

Each chunk is one object, ``{url}/{namespace}/{folder of its upload}/{part}-{i}``, which is written once and never
changed. What is current, the manifests and the list of unfinished uploads stay in Redis, whose scripts commit them at
once (:mod:`feature_store.commit_scripts`): an object that no manifest in Redis names is seen by nobody.

A call that takes too long is left alone in its thread: a client's library cannot be interrupted.
"""

import errno
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from feature_store.config import ChunksConfig
from smes.errors import FeatureStoreError, FeatureStoreUnavailable
from smes_io.secrets import masked_text

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_T = TypeVar("_T")
_REMOVED_AT_ONCE = 16
"""So many objects are removed within a call's time limit: a chain of versions has thousands."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Objects:
    """The objects of one namespace. Safe to share between threads.

    Args:
        url: Where they are, as fsspec has it: ``s3://bucket/folder``, ``file:///folder``, ….
        namespace: Names a folder there.
        options: What the file system of the URL takes, beside the URL.
        timeout_s: Longest wait for each call.

    Raises:
        ValueError: fsspec knows no such file system, or does not take these options.
    """

    def __init__(
        self, url: str, namespace: str, options: Mapping[str, Any] | None = None, timeout_s: float = 30.0
    ) -> None:
        self.place = masked_text(url)
        """The URL, without a password."""
        self._timeout_s = timeout_s
        self._fs, root = _opened(url, dict(options or {}))
        folder = quote(namespace, safe="").replace(".", "%2E")
        self._root = f"{root.rstrip('/')}/{folder}"

    @classmethod
    def of(cls, config: ChunksConfig, namespace: str) -> "Objects | None":
        """Those that are configured; None: chunks go to Redis.

        Raises:
            ValueError: As above; the message names the configuration key.
        """
        if config.url == "redis":
            return None
        try:
            return cls(config.url, namespace, config.options, config.timeout_s)
        except ValueError as error:
            raise ValueError(f"feature_store.chunks: {error}") from error

    def write(self, name: str, piece: bytes) -> None:
        """Write an object.

        Raises:
            FeatureStoreUnavailable: No answer in time, or an error of the store.
            FeatureStoreError: There is no room, or nothing may be written.
        """
        path = self._path(name)

        def write() -> None:
            try:
                self._fs.pipe_file(path, piece)
            except FileNotFoundError:  # a file system: it has folders
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(path, piece)

        self._call(f"object {name} was written", write)

    def read(self, name: str, most_bytes: int) -> bytes:
        """The beginning of an object: one byte more than ``most_bytes``, so that a longer one is noticed.

        Empty if there is none.

        Raises:
            FeatureStoreUnavailable: No answer in time, or an error of the store.
        """
        path = self._path(name)

        def read() -> bytes:
            try:
                return bytes(self._fs.cat_file(path, start=0, end=most_bytes + 1))
            except FileNotFoundError:
                return b""

        return self._call(f"object {name} was read", read)

    def missing(self, names: Collection[str]) -> int:
        """How many of these objects do not exist; errors as :meth:`read`."""
        return len(set(names) - set(self._names())) if names else 0

    def folders(self) -> set[str]:
        """The folders of all uploads that have an object; errors as :meth:`read`."""
        return {name.partition("/")[0] for name in self._names()}

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; errors as :meth:`read`. Those that are gone already are not missed."""
        paths = [self._path(name) for name in names]
        for start in range(0, len(paths), _REMOVED_AT_ONCE):
            self._remove(paths[start : start + _REMOVED_AT_ONCE])

    def _remove(self, paths: list[str]) -> None:
        def remove() -> None:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)
            for folder in {path.rpartition("/")[0] for path in paths}:  # file systems keep empty ones
                with suppress(OSError, NotImplementedError):
                    self._fs.rmdir(folder)

        self._call(f"{len(paths)} objects were removed", remove)

    def remove_folder(self, folder: str) -> None:
        """Remove all that an upload has written; errors as :meth:`read`."""
        self.remove(self._names(folder))

    def _names(self, folder: str = "") -> list[str]:
        """The names of all objects, or of those in a folder."""
        root = self._path(folder).rstrip("/")

        def find() -> list[str]:
            self._fs.invalidate_cache()
            return [str(path) for path in self._fs.find(root)] if self._fs.exists(root) else []

        # What comes back may have lost the slash at its beginning.
        prefix = self._root.lstrip("/") + "/"
        found = (path.lstrip("/") for path in self._call("objects were listed", find))
        return [path.removeprefix(prefix) for path in found if path.startswith(prefix) and path.count("/") > 1]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _call(self, doing: str, call: Callable[[], _T]) -> _T:
        """The call's result, within the time limit."""
        results: list[_T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(call())
            except Exception as error:  # noqa: BLE001  # whatever the library raises; it is raised in the caller
                errors.append(error)

        thread = threading.Thread(target=run, name="objects", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if results:
            return results[0]
        where = f"object store {self.place}"
        if not errors:
            raise FeatureStoreUnavailable(f"{where} gave no answer within {self._timeout_s:g} s while {doing}")
        error = errors[0]
        what = f"{where} failed while {doing}: {error or type(error).__name__}"
        kind = FeatureStoreError if getattr(error, "errno", None) in _NO_ROOM else FeatureStoreUnavailable
        raise kind(what) from error


def _opened(url: str, options: dict[str, Any]) -> "tuple[AbstractFileSystem, str]":
    from fsspec.core import url_to_fs

    if "://" not in url:
        raise ValueError(f"url {masked_text(url)!r}, expected redis, or a URL of fsspec such as s3://bucket/folder")
    try:
        fs, root = url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:  # no library for it is installed; no such protocol or option
        raise ValueError(f"url {masked_text(url)!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"url {masked_text(url)!r}: {type(error).__name__}: {error}") from error
    return fs, str(root)
