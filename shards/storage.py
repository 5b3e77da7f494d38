"""Where the files of a shard set lie: a local folder, or any URL that fsspec opens. Reads are exact, or an error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol, TypeVar

from fsspec.asyn import sync
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError
from fsspec.utils import get_protocol

from shards import open_files

log = logging.getLogger(__name__)

RETRY_PAUSES = (0.5, 1, 2, 4, 8)  # seconds: enough for a server restart or a lost connection
OUTAGE_PAUSE, OUTAGE_PATIENCE = 30, 600  # seconds per later pause, and in all, when reading frames: long runs can wait
REFUSED = (401, 403, 404)  # HTTP statuses that waiting does not fix
HTTP_PATIENCE = 30  # seconds of silence
PATIENCE = OUTAGE_PATIENCE / 6  # seconds for a few MB: a server may send slowly
MIN_RATE = 10_000  # bytes per second, for transfers longer than that

Result = TypeVar("Result")


class StorageError(OSError):
    """Storage that does not give what it is asked for; says the path or URL."""


class Span(NamedTuple):
    """Bytes start .. end - 1 of a file."""

    file: str
    start: int
    end: int


class Storage(Protocol):
    """The files of a shard set, by name. Cheap to pickle; a process opens what it needs by itself."""

    def sizes(self, names: list[str]) -> list[int | None]:
        """Bytes of each file; None where it is missing."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError or StorageError."""
        ...

    def read_spans(self, spans: list[Span]) -> list[bytes]:
        """Just these bytes, in one request a span; fewer where a file ends. Raises as read, or StorageError."""
        ...

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A path under which the file can be read on this machine."""
        ...


def storage_at(location: str | Path) -> Storage:
    """Raises ValueError if no package for this kind of URL is installed."""
    if isinstance(location, Path) or get_protocol(location) == "file":
        return LocalStorage(Path(str(location).removeprefix("file://")).expanduser())
    try:
        return RemoteStorage(location)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{location}: cannot be opened: {error}") from error


class LocalStorage:
    def __init__(self, root: Path) -> None:
        self.root = root
        open_files.forget(root)

    def __str__(self) -> str:
        return str(self.root)

    def sizes(self, names: list[str]) -> list[int | None]:
        return [path.stat().st_size if (path := self.root / name).is_file() else None for name in names]

    def read(self, name: str) -> bytes:
        with _said(str(self.root / name)):
            return (self.root / name).read_bytes()

    def read_spans(self, spans: list[Span]) -> list[bytes]:
        parts = []
        for span in spans:
            path = self.root / span.file
            with _said(str(path)):
                parts.append(open_files.read(path, span.start, span.end))
        return parts

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self.root / name


class RemoteStorage:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.knows_ranges = False  # whether it has ever given a part of a file
        _filesystem(self.url)

    def __str__(self) -> str:
        return self.url

    def sizes(self, names: list[str]) -> list[int | None]:
        fs, root = _filesystem(self.url)
        try:
            return _tried(self.url, lambda: _within(fs, "sizes", [f"{root}/{name}" for name in names]))
        except FileNotFoundError:  # of one of them
            return [self._size(name) for name in names]

    def _size(self, name: str) -> int | None:
        fs, root = _filesystem(self.url)
        try:
            return _tried(f"{self.url}/{name}", lambda: _within(fs, "size", f"{root}/{name}"))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        fs, root = _filesystem(self.url)
        return _tried(f"{self.url}/{name}", lambda: _within(fs, "cat_file", f"{root}/{name}"))

    def read_spans(self, spans: list[Span]) -> list[bytes]:
        fs, root = _filesystem(self.url)
        parts: dict[Span, bytes] = {}
        missing, tries, began = spans, 0, time.monotonic()
        while True:
            paths = [f"{root}/{span.file}" for span in missing]
            found = _cat_ranges(fs, paths, [s.start for s in missing], [s.end for s in missing])
            answers = dict(zip(missing, found, strict=True))
            parts |= {span: part for span, a in answers.items() if (part := self._part(span, a, tries)) is not None}
            missing = [span for span in missing if span not in parts]
            if not missing:
                return [parts[span] for span in spans]
            where, error = f"{self.url}/{missing[0].file}", answers[missing[0]]
            if isinstance(error, bytes):
                error = OSError(f"asked for {missing[0].end - missing[0].start} bytes, got {len(error)}")
            tries += 1
            pause = RETRY_PAUSES[tries - 1] if tries <= len(RETRY_PAUSES) else OUTAGE_PAUSE
            over = _is_refused(error) or time.monotonic() + pause - began > OUTAGE_PATIENCE
            if tries > len(RETRY_PAUSES) and over:
                raise StorageError(f"{where}: not to be read in {tries} tries: {error!r}") from error
            log.warning("%s: %r; trying again in %g s", where, error, pause)
            time.sleep(pause)

    def _part(self, span: Span, answer: bytes | Exception, tries: int) -> bytes | None:
        """What there is of a span, or None if asking again may help. Raises StorageError if the server has no ranges.

        A gateway may answer with a page of its own, or a whole file, for a while.
        """
        if not isinstance(answer, bytes):
            return b"" if getattr(answer, "status", None) == 416 else None  # HTTP's for a file that ends before
        wanted = span.end - span.start
        if len(answer) > wanted and not self.knows_ranges:
            raise StorageError(
                f"{self.url}/{span.file}: asked for {wanted} bytes, got {len(answer)}: this server ignores HTTP ranges "
                "and sends whole files. Serve the shards from one that knows ranges (nginx, an object store), or copy "
                "them here"
            )
        self.knows_ranges |= len(answer) == wanted
        short = len(answer) < wanted and tries >= len(RETRY_PAUSES)
        whole = len(answer) == wanted or (short and self._ends_at(span.file, span.start + len(answer)))
        return answer if whole else None

    def _ends_at(self, name: str, size: int) -> bool:
        try:
            return self._size(name) == size
        except StorageError:
            return False

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        fs, root = _filesystem(self.url)
        with TemporaryDirectory() as folder:
            path, copy = f"{root}/{name}", f"{folder}/{name}"
            _tried(f"{self.url}/{name}", lambda: fs.get_file(path, copy, callback=_Steady()))
            try:
                yield Path(folder) / name
            finally:
                open_files.forget(Path(folder))  # an open file would keep the disk full


class _Steady(Callback):
    """Ends a transfer that trickles: a large file may take long, but must come."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        took = time.monotonic() - self.began
        if took > PATIENCE and self.value < MIN_RATE * took:
            raise OSError(f"only {self.value} bytes came in {took:.0f} s")  # fsspec would lose what a TimeoutError says


def _tried(where: str, call: Callable[[], Result]) -> Result:
    """What a call gives, tried again while storage fails. Raises FileNotFoundError at once, StorageError at last."""
    for pause in RETRY_PAUSES:
        try:
            with _said(where):
                return call()
        except StorageError as error:
            log.warning("%s; trying again in %g s", error, pause)
            time.sleep(pause)
    with _said(where):
        return call()


def _cat_ranges(fs: Any, paths: list[str], starts: list[int], ends: list[int]) -> list[Any]:
    """The bytes of each range, or why there are none."""
    try:
        return _within(fs, "cat_ranges", paths, starts, ends, on_error="return")
    except TimeoutError as error:
        return [error for _ in paths]


def _within(fs: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of a file system gives, in PATIENCE. Raises TimeoutError after that."""
    if not fs.async_impl:  # a local or mounted one
        return getattr(fs, method)(*arguments, **options)
    began = time.monotonic()
    try:
        return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=PATIENCE, **options)
    except FSTimeoutError as error:  # this limit, or that of silence
        raise TimeoutError(f"not there after {time.monotonic() - began:.0f} s") from error


def _is_refused(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in REFUSED


@contextmanager
def _said(where: str) -> Iterator[None]:
    """Every package behind fsspec has errors of its own: all become one that says where."""
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec calls a file missing whenever a server does not give its size
        lost = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | PermissionError)
        if lost or getattr(cause, "status", 404) not in REFUSED:
            raise StorageError(f"{where}: {cause!r}") from error
        raise FileNotFoundError(f"{where}: no such file") from error
    except Exception as error:
        raise StorageError(f"{where}: {str(error) or repr(error)} ({type(error).__name__})") from error


_filesystems: dict[str, tuple[Any, str]] = {}
_inherited: list[dict[str, tuple[Any, str]]] = []  # of the parent: collected as garbage here, they would close there


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the root in it."""
    if url not in _filesystems:
        _filesystems[url] = url_to_fs(url, skip_instance_cache=True, **_http_options(url))
    return _filesystems[url]


def _http_options(url: str) -> dict[str, Any]:
    """A server that falls silent is an error after half a minute, where aiohttp would wait for five."""
    if get_protocol(url) not in ("http", "https"):
        return {}
    try:
        from aiohttp import ClientTimeout
    except ImportError as error:
        raise ImportError(f"it needs the extra `http`: pip install -e '.[http]' ({error})") from error
    timeout = ClientTimeout(total=None, sock_connect=HTTP_PATIENCE, sock_read=HTTP_PATIENCE)
    return {"client_kwargs": {"timeout": timeout}}


def _start_clean() -> None:
    """After a fork: sessions of fsspec belong to the parent."""
    _inherited.append(dict(_filesystems))
    _filesystems.clear()


os.register_at_fork(after_in_child=_start_clean)
