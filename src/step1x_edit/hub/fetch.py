"""Fetching published models from the hub, or from the mirror that HF_ENDPOINT names.

The hub's own library lists the files and makes the requests. This module adds what it lacks:
downloads that continue after the process was killed, a check of the received content, and a folder
that appears only when it is complete. Files are stored in the partial folder under their own names.
A file shorter than listed is continued; one of the listed length is compared with its checksum.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from step1x_edit.errors import ModelFetchError, NoSpaceError, OutputNotWritableError
from step1x_edit.hub.catalog import Model, Source, find_model
from step1x_edit.hub.pulled import held, kept_models, partial_folder, publish

TRIES: Final = 6
"""Failures in a row, without a byte received in between, before giving up."""
LONGEST_PAUSE_S: Final = 60.0
READ_SIZE: Final = 1024 * 1024

# The hub's library would send its server details about the user and the installed software.
constants.HF_HUB_DISABLE_TELEMETRY = True


@dataclass(frozen=True)
class PullProgress:
    """How much of a model is on disk; `text` is for people."""

    phase: Literal["downloading", "checking", "waiting"]
    done: int
    total: int
    text: str


Report = Callable[[PullProgress], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub: its URL, its destination, and its expected size and checksum."""

    repo: str
    url: str
    path: PurePosixPath
    size: int
    sha256: str | None
    git_id: str | None
    """SHA-1 over a header and the content, which the hub reports for small files."""

    def is_intact(self, path: Path, after_piece: Callable[[], None]) -> bool:
        """Whether the content matches the hub's checksum; true if the hub lists none.

        `after_piece` is called after each piece: reading 17 GB takes a while, and it may raise.
        """
        if self.sha256 is not None:
            digest, expected = hashlib.sha256(), self.sha256
        elif self.git_id is not None:
            digest, expected = hashlib.sha1(usedforsecurity=False), self.git_id
            digest.update(b"blob %d\0" % self.size)
        else:
            return True
        with path.open("rb") as file:
            while chunk := file.read(READ_SIZE):
                digest.update(chunk)
                after_piece()
        return digest.hexdigest() == expected


def pull(
    name: str,
    models: Path,
    report: Report = lambda progress: None,
    *,
    endpoint: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch a model of the catalog or the hub into a folder below `models`; return that folder.

    Does nothing if the model is there. Continues what an earlier pull has left. Without an
    `endpoint`, uses HF_ENDPOINT or the public hub. Raises ModelFetchError, NoSpaceError and
    OutputNotWritableError.
    """
    model = find_model(name)
    folder = models / model.folder_name
    if folder.is_dir():
        return folder
    with _disk_errors_explained(models), held(model, models):
        if folder.is_dir():  # another process completed it while this one waited
            return folder
        files = _list_files(model, endpoint, wait)
        download = _Download(model, files, partial_folder(model, models), report, wait)
        download.run()
        return publish(model, models)


def _list_files(
    model: Model, endpoint: str | None, wait: Callable[[float], None]
) -> list[RemoteFile]:
    files = [file for source in model.sources for file in _list_source(source, endpoint, wait)]
    if not any(file.path.suffix == ".safetensors" for file in files):
        raise ModelFetchError(f"{model.name} has no safetensors, the only format fetched")
    return sorted(files, key=lambda file: file.size)  # small files first: errors appear early


def _list_source(
    source: Source, endpoint: str | None, wait: Callable[[float], None]
) -> list[RemoteFile]:
    api = HfApi(endpoint=endpoint, library_name="step1x-edit")
    patience = _Patience(source.repo, api.endpoint, wait)
    while True:
        try:
            info = api.model_info(
                source.repo, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            break
        except (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled) as error:
            patience.after(error)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # not a listing
            raise ModelFetchError(
                f"{api.endpoint} does not answer as the hub does; check HF_ENDPOINT"
            ) from error
    siblings = [sibling for sibling in info.siblings or [] if source.wants(sibling.rfilename)]
    for pattern in source.patterns:
        is_name = "*" not in pattern
        if is_name and not any(sibling.rfilename == pattern for sibling in siblings):
            raise ModelFetchError(f"{source.repo} at {api.endpoint} has no {pattern}")
    return [_remote_file(source, sibling, info.sha, endpoint) for sibling in siblings]


def _remote_file(
    source: Source, sibling: RepoSibling, commit: str | None, endpoint: str | None
) -> RemoteFile:
    path = PurePosixPath(sibling.rfilename)
    is_inside = not path.is_absolute() and ".." not in path.parts
    if not is_inside or any(sign in sibling.rfilename for sign in '\\:\0<>|?*"'):
        raise ModelFetchError(f"{source.repo} holds a file with the unsafe name {path}")
    if sibling.size is None:
        raise ModelFetchError(f"the hub lists no size for {path} of {source.repo}")
    return RemoteFile(
        source.repo,
        hf_hub_url(source.repo, sibling.rfilename, revision=commit, endpoint=endpoint),
        PurePosixPath(source.subfolder) / path,
        sibling.size,
        sibling.lfs.sha256 if sibling.lfs else None,
        None if sibling.lfs else sibling.blob_id,
    )


class _Download:
    """One model being downloaded into its partial folder."""

    def __init__(
        self,
        model: Model,
        files: Sequence[RemoteFile],
        folder: Path,
        report: Report,
        wait: Callable[[float], None],
    ) -> None:
        self._model = model
        self._files = files
        self._folder = folder
        self._report = report
        self._wait = wait
        self._total = sum(file.size for file in files)
        self._done = 0
        self._headers = build_hf_headers(
            library_name="step1x-edit",
            # A response that is compressed in transit cannot be continued.
            headers={"Accept-Encoding": "identity"},
        )

    def run(self) -> None:
        """Fetch and check all files; delete other files in the folder."""
        self._clear()
        self._share()
        self._done = sum(_length(self._folder / file.path) for file in self._files)
        self._check_room()
        for file in self._files:
            self._fetch(file)
        self._notify("downloading", "complete")

    def _clear(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        sizes = {self._folder / file.path: file.size for file in self._files}
        for path in list(self._folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            if path.is_symlink() or _length(path) > sizes.get(path, -1):
                path.unlink()

    def _share(self) -> None:
        """Link large files that other models have too; they are checked later.

        v1.0 and v1.1 share 17 of their 42 GB.
        """
        wanted = {
            file.size: self._folder / file.path
            for file in self._files
            if file.sha256 is not None and _length(self._folder / file.path) == 0
        }
        for kept in kept_models(self._folder.parent):
            if kept.state == "partial":
                continue
            for candidate in kept.folder.rglob("*.safetensors"):
                path = wanted.get(_length(candidate))
                if path is not None:
                    with suppress(OSError):  # present, or links are not supported: it is fetched
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.hardlink_to(candidate)

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._folder).free
        needed = self._total - self._done
        if needed > free:
            raise NoSpaceError(
                f"{self._model.name} needs {_gigabytes(needed)} more in {self._folder.parent}, "
                f"where {_gigabytes(free)} are free: {_gigabytes(needed - free)} are missing"
            )

    def _fetch(self, file: RemoteFile) -> None:
        path = self._folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            self._complete(file, path)
            checking = partial(self._notify, "checking", str(file.path))
            checking()
            if file.is_intact(path, checking):
                _flush(path)
                return
            # Wrong content: the part from an earlier run, or a byte in transit.
            path.unlink()
            self._done -= file.size
        raise ModelFetchError(
            f"{file.path} does not match its checksum; "
            "try again later, or from another mirror (HF_ENDPOINT)"
        )

    def _complete(self, file: RemoteFile, path: Path) -> None:
        """Append to the file until it has the listed length."""
        path.touch()
        patience = _Patience(f"{file.path} of {file.repo}", _host(file.url), self._pause)
        while (have := _length(path)) < file.size:
            self._notify("downloading", str(file.path))
            try:
                self._append(file, path)
            except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
                if _length(path) > have:
                    patience.renew()
                patience.after(error)

    def _append(self, file: RemoteFile, path: Path) -> None:
        have = _length(path)
        headers = {**self._headers, **({"Range": f"bytes={have}-"} if have else {})}
        request = get_session().stream(
            "GET", file.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        with path.open("ab") as target, request as response:
            hf_raise_for_status(response)
            if response.status_code != httpx2.codes.PARTIAL_CONTENT and have:
                target.truncate(0)  # the server does not support ranges
                self._done -= have
                have = 0
            _check_length(file, have, response)
            self._receive(file, have, response, target)

    def _receive(
        self, file: RemoteFile, have: int, response: httpx2.Response, target: BinaryIO
    ) -> None:
        for chunk in response.iter_bytes():
            if have + len(chunk) > file.size:
                raise _other_length(file, "more")
            target.write(chunk)
            have += len(chunk)
            self._done += len(chunk)
            self._notify("downloading", str(file.path))
        if have < file.size:  # without a Content-Length, a cut looks like an end
            raise httpx2.RemoteProtocolError(f"{file.path} ended after {have} bytes")

    def _pause(self, seconds: float) -> None:
        self._notify("waiting", f"trying again in {seconds:g} s")
        self._wait(seconds)

    def _notify(self, phase: Literal["downloading", "checking", "waiting"], text: str) -> None:
        self._report(PullProgress(phase, self._done, self._total, text))


class _Patience:
    """Counts failures in a row, with increasing pauses between them."""

    def __init__(self, what: str, host: str, wait: Callable[[float], None]) -> None:
        self._what = what
        self._host = host
        self._wait = wait
        self._failures = 0

    def renew(self) -> None:
        """Reset the count, because data has arrived."""
        self._failures = 0

    def after(self, error: Exception) -> None:
        """Wait until the next try. Raises ModelFetchError if retrying does not help."""
        self._failures += 1
        if self._failures == TRIES or not _is_passing(error):
            raise ModelFetchError(self._sentence(error)) from error
        self._wait(_asked_pause(error) or min(2.0 ** (self._failures - 2), LONGEST_PAUSE_S))

    def _sentence(self, error: Exception) -> str:
        host = _asked_host(error) or self._host
        match error:
            case OfflineModeIsEnabled():
                return "HF_HUB_OFFLINE is set, so nothing is fetched; unset it"
            case HfHubHTTPError():
                return self._answer(error, host)
            case httpx2.TimeoutException():
                return f"{host} does not answer; check the network, or try again later"
            case httpx2.ConnectError() | httpx2.ProxyError() | httpx2.InvalidURL():
                return (
                    f"{host} cannot be reached ({error}); check the network, "
                    "or set HF_ENDPOINT to a mirror"
                )
            case httpx2.UnsupportedProtocol():
                return f"{host} is not a URL; set HF_ENDPOINT to https://…"
        return (
            f"the connection to {host} fails repeatedly ({self._what}); "
            "run the same command again to continue"
        )

    def _answer(self, error: HfHubHTTPError, host: str) -> str:
        status = error.response.status_code
        is_hub = host == self._host  # not the host of its large files
        if isinstance(error, GatedRepoError) or (is_hub and status == httpx2.codes.FORBIDDEN):
            return (
                f"{self._what} is gated: accept its terms on {host}, "
                "then set HF_TOKEN to a token of that account"
            )
        if is_hub and status == httpx2.codes.UNAUTHORIZED:
            return (
                f"{host} requires a valid token for {self._what}: it does not "
                "exist or is private; check the name, or set HF_TOKEN"
            )
        if is_hub and status == httpx2.codes.NOT_FOUND:
            return f"{host} has no {self._what}; check the name"
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            return f"{host} reports too many requests (429); run the same command later"
        return f"{host} answers {status} to {self._what}; try again later"


def _asked_host(error: Exception) -> str | None:
    """The server that failed: the hub redirects to others, which may be blocked separately."""
    if isinstance(error, HfHubHTTPError):
        return _host(str(error.response.url))
    if isinstance(error, httpx2.HTTPError):
        with suppress(RuntimeError, ValueError):  # no request was sent
            return _host(str(error.request.url))
    return None


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed soon."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= httpx2.codes.INTERNAL_SERVER_ERROR
    is_wrong_address = isinstance(error, httpx2.UnsupportedProtocol)
    return isinstance(error, httpx2.TransportError) and not is_wrong_address


def _asked_pause(error: Exception) -> float | None:
    """The pause that the server requests, within limits."""
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        if asked.isdecimal():
            return min(float(asked), LONGEST_PAUSE_S)
    return None


def _check_length(file: RemoteFile, have: int, response: httpx2.Response) -> None:
    """Refuse a response that announces anything but the rest of the file."""
    announced = response.headers.get("Content-Length", "")
    is_plain = announced.isdecimal() and "Content-Encoding" not in response.headers
    if is_plain and have + int(announced) != file.size:
        raise _other_length(file, str(have + int(announced)))


def _other_length(file: RemoteFile, announced: str) -> ModelFetchError:
    return ModelFetchError(
        f"{_host(file.url)} sends {file.path} in another size than it lists "
        f"({announced} instead of {file.size} bytes); try again later, or from another mirror "
        "(HF_ENDPOINT)"
    )


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _host(url: str) -> str:
    parsed = httpx2.URL(url)
    return f"{parsed.scheme}://{parsed.netloc.decode('ascii')}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


@contextmanager
def _disk_errors_explained(models: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise NoSpaceError(
                f"the disk of {models} is full; received data is kept; run the same command again"
            ) from error
        raise OutputNotWritableError(f"{error.filename or models}: {error.strerror}") from error
