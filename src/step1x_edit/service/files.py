"""Files of the callers: what may be read, where results go, and how they are published.

The only module that touches paths that callers name. It guarantees:

- reading and writing stay inside the allowed folders, with links resolved, and the file that was
  checked is the file that is read: one descriptor from the check to the last byte;
- an input that does not exist means the one file of its folder whose name looks the same, if
  there is exactly one: assistants write a space where macOS puts U+202F. Outputs are never guessed;
- a `file://` link, as our answers contain it, is converted to its path;
- an input is never changed: an output that is an input, by inode, is refused;
- an output is complete or absent, and never replaces a file unless overwriting was requested.

It knows nothing about pictures except the suffixes that can be written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final
from urllib.request import url2pathname

from step1x_edit.errors import (
    ImageFileNotFoundError,
    ImageTooLargeError,
    InvalidParameterError,
    NoSpaceError,
    OutputExistsError,
    OutputNotWritableError,
    PathNotAllowedError,
)
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS

MAX_NAME_BYTES: Final = 255
MAX_STEM_BYTES: Final = 60  # of a name derived from a prompt
_ROOM_FOR_NUMBER: Final = len("_99999")
_CHUNK: Final = 1 << 20
_LINK: Final = "file://"
_HYPHENS: Final = "\u2010\u2011"  # they look like the ASCII hyphen
_TEMPORARY_PREFIX: Final = ".step1x-edit-"  # only if unnamed files are not supported

# Absent on Windows, which does not need them.
_O_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
_O_NONBLOCK: Final[int] = getattr(os, "O_NONBLOCK", 0)
_O_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_O_DIRECTORY: Final[int] = getattr(os, "O_DIRECTORY", 0)
_O_CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)
_O_TMPFILE: Final[int] = getattr(os, "O_TMPFILE", 0)

_READ_FLAGS: Final = os.O_RDONLY | _O_BINARY | _O_NOFOLLOW | _O_NONBLOCK | _O_CLOEXEC
_WRITE_FLAGS: Final = os.O_WRONLY | _O_BINARY | _O_CLOEXEC
_FOLDER_FLAGS: Final = os.O_RDONLY | _O_DIRECTORY | _O_NOFOLLOW | _O_CLOEXEC

_CAN_WORK_BELOW_DESCRIPTORS: Final = {
    os.open,
    os.link,
    os.rename,
    os.unlink,
    os.mkdir,
} <= os.supports_dir_fd
_OWN_DESCRIPTORS: Final = "/proc/self/fd"  # Linux: each descriptor is a link to its file
_NO_HARD_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # FAT, some network drives
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class FileIdentity:
    """The identity of a file, independent of its names."""

    device: int
    inode: int


@dataclass(frozen=True)
class InputFile:
    """The content of a file that a caller named."""

    path: Path
    data: bytes
    identity: FileIdentity


@dataclass(frozen=True)
class Output:
    """The destination of a result; checked, but not yet created."""

    folder: Path
    """The real folder, links resolved; `shown_folder` is the same with links unresolved."""
    shown_folder: Path
    stem: str
    suffix: str
    overwrite: bool
    number: int | None
    """The first number to try if the name may be numbered; None: the name is fixed."""
    inputs: frozenset[FileIdentity]

    @property
    def shown(self) -> str:
        """The output with links unresolved, for messages."""
        return str(self.shown_folder / next(self.names()))

    def names(self) -> Iterator[str]:
        """The names to try, in order."""
        if self.number is None:
            yield self.stem + self.suffix
            return
        for number in count(self.number):
            yield _numbered(self.stem, number) + self.suffix


class FileAccess:
    """Reads inputs and publishes outputs inside the allowed folders."""

    def __init__(self, allowed_dirs: Iterable[Path], max_bytes: int) -> None:
        self._roots = tuple(Path(os.path.realpath(folder)) for folder in allowed_dirs)
        self._max_bytes = max_bytes

    # --- inputs ---

    def read(self, path: str) -> InputFile:
        """The content of a regular file."""
        real = self._real_input(path)
        descriptor = _open_regular(real, path)
        with os.fdopen(descriptor, "rb", buffering=0):
            found = os.fstat(descriptor)
            _check_regular(found, path)
            if not self._allows(_where(descriptor, real)):
                raise _not_allowed(path)  # a folder or link was replaced after the first check
            if found.st_size > self._max_bytes:
                raise self._too_long()
            data = self._read_all(descriptor, path)
        return InputFile(_absolute(path), data, FileIdentity(found.st_dev, found.st_ino))

    def read_stream(self, stream: BinaryIO) -> bytes:
        """The content of a stream; if it is too long, just enough of it to detect that."""
        return stream.read(self._max_bytes + 1)

    def beside(self, path: Path, suffixes: Collection[str], most: int) -> list[Path]:
        """Up to `most` regular files with such suffixes in the folder of a file.

        Those whose name the file's continues come first: `photo.jpg` for `photo_edited.png`.
        """
        self._real_inside(str(path.parent), written_as=str(path))
        with os.scandir(path.parent) as entries:
            found = [
                Path(entry.path)
                for entry in entries
                if Path(entry.name).suffix.lower() in suffixes
                and entry.is_file(follow_symlinks=False)
                and entry.stat(follow_symlinks=False).st_size <= self._max_bytes
            ]
        found.sort(key=lambda each: (not path.stem.startswith(each.stem), each.name))
        return found[:most]

    def identify(self, paths: Iterable[str]) -> frozenset[FileIdentity]:
        """The identities of these files; missing or disallowed ones are left out."""
        found = set()
        for path in paths:
            with contextlib.suppress(ImageFileNotFoundError, PathNotAllowedError):
                found.add(_identity(self._real_input(path)))
        return frozenset(identity for identity in found if identity is not None)

    def _read_all(self, descriptor: int, path: str) -> bytes:
        content = bytearray()
        try:
            while chunk := os.read(descriptor, _CHUNK):
                content += chunk
                if len(content) > self._max_bytes:  # it grew while it was read
                    raise self._too_long()
        except OSError:
            raise ImageFileNotFoundError(f"{path} (it cannot be read)") from None
        return bytes(content)

    def _too_long(self) -> ImageTooLargeError:
        return ImageTooLargeError(f"at most {self._max_bytes / 2**20:g} MB are allowed")

    # --- outputs ---

    def plan_output(
        self, output_path: str, inputs: Iterable[FileIdentity], *, overwrite: bool = False
    ) -> Output:
        """The output that the caller named, checked as far as possible before the edit."""
        output = self.named_output(output_path, inputs, overwrite=overwrite)
        path = Path(output.shown)
        _check_not_input(output, path.name)
        if path.is_dir():
            raise OutputNotWritableError(f"{output_path} (it is a folder)")
        if not overwrite and os.path.lexists(path):
            raise OutputExistsError(output_path)
        _check_folder(output)
        return output

    def named_output(
        self, output_path: str, inputs: Iterable[FileIdentity] = (), *, overwrite: bool = False
    ) -> Output:
        """As `plan_output`, but nothing is checked except the path itself."""
        self._real_output(output_path)
        shown = _absolute(output_path)
        if shown.suffix.lower() not in OUTPUT_FORMATS:
            *others, last = OUTPUT_FORMATS
            raise InvalidParameterError(
                f"output_path must end in {', '.join(others)} or {last}, got {output_path!r}"
            )
        if len(os.fsencode(shown.name)) > MAX_NAME_BYTES:
            raise OutputNotWritableError(f"{output_path} (the name is too long)")
        return Output(
            # An output replaces a link and is not written through it.
            folder=self._real_output(str(shown.parent), written_as=output_path),
            shown_folder=shown.parent,
            stem=shown.stem,
            suffix=shown.suffix,
            overwrite=overwrite,
            number=None,
            inputs=frozenset(inputs),
        )

    def plan_default_output(
        self,
        image_path: str,
        inputs: Iterable[FileIdentity],
        *,
        output_dir: str | None = None,
        overwrite: bool = False,
        taken: set[str] | None = None,
    ) -> Output:
        """`<stem>_edited<suffix>` beside the input or in `output_dir`, numbered if taken.

        The set `taken` keeps the outputs of a batch distinct: each planned path is added to it.
        """
        output = self.default_output(
            image_path, inputs, output_dir=output_dir, overwrite=overwrite, taken=taken
        )
        if overwrite and Path(output.shown).is_dir():
            raise OutputNotWritableError(f"{output.shown} (it is a folder)")
        _check_folder(output)
        return output

    def default_output(
        self,
        image_path: str,
        inputs: Iterable[FileIdentity],
        *,
        output_dir: str | None = None,
        overwrite: bool = False,
        taken: set[str] | None = None,
    ) -> Output:
        """As `plan_default_output`, but nothing is checked except the path itself."""
        image = _absolute(image_path)
        shown_folder = image.parent if output_dir is None else _absolute(output_dir)
        folder = self._real_output(str(shown_folder), written_as=output_dir or image_path)
        suffix = image.suffix if image.suffix.lower() in OUTPUT_FORMATS else ".png"
        room = MAX_NAME_BYTES - len("_edited") - _ROOM_FOR_NUMBER - len(suffix)
        stem = _cut(image.stem, room) + "_edited"
        inputs = frozenset(inputs)
        taken = set() if taken is None else taken
        for number in count(1):
            path = folder / (_numbered(stem, number) + suffix)
            if _folded(path) not in taken and _identity(path) not in inputs:
                taken.add(_folded(path))
                break
        return Output(folder, shown_folder, stem, suffix, overwrite, number, inputs)

    def plan_new_output(self, text: str, *, overwrite: bool = False) -> Output:
        """A PNG named after a text, numbered if taken, for a picture that has no input.

        It goes into the start folder or, if that is not allowed, into the first allowed folder.
        """
        folders = [*self._roots]
        with contextlib.suppress(OSError):  # the start folder has been removed
            folders.insert(0, Path.cwd())
        shown_folder = next(filter(self._allows, folders), Path(os.curdir))
        output = Output(
            folder=self._real_output(str(shown_folder)),
            shown_folder=shown_folder,
            stem=stem_of(text),
            suffix=".png",
            overwrite=overwrite,
            number=1,
            inputs=frozenset(),
        )
        _check_folder(output)
        return output

    def publish(self, output: Output, data: bytes) -> Path:
        """Publish the result, completely or not at all; returns its absolute path."""
        existing = nearest_existing(output.folder)
        try:
            with _Folder(existing) as folder:
                if not self._allows(folder.where()):
                    raise _not_allowed(output.shown)
                for part in output.folder.relative_to(existing).parts:
                    folder.descend(part)
                if output.overwrite:
                    name = next(output.names())
                    _check_not_input(output, name)
                    folder.replace(name, data)
                else:
                    name = folder.add(output.names(), data)
        except FileExistsError:
            raise OutputExistsError(output.shown) from None
        except OSError as error:
            raise _not_writable(output, error) from None
        return output.shown_folder / name

    # --- allowed folders ---

    def _real_input(self, path: str) -> Path:
        """The real path of an input, also if its name only looks the same."""
        try:
            real = self._real_inside(path)
            if os.path.lexists(real) or (alike := _alike(real)) is None:
                return real
            return self._real_inside(str(alike), written_as=path)
        except OSError:  # links are being replaced at this moment
            raise ImageFileNotFoundError(path) from None

    def _real_output(self, path: str, written_as: str | None = None) -> Path:
        """The real path of an output or its folder."""
        try:
            return self._real_inside(path, written_as)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EINVAL).lower()
            raise OutputNotWritableError(f"{written_as or path} ({reason})") from None

    def _real_inside(self, path: str, written_as: str | None = None) -> Path:
        """The real path, links resolved, of a path inside the allowed folders.

        The error does not reveal whether anything exists outside of them. Raises OSError if the
        system cannot follow the path.
        """
        if "\0" in expanded(path) or not self._allows(real := _real(path)):
            raise _not_allowed(path if written_as is None else written_as)
        return real

    def _allows(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)


class _Folder:
    """An open folder: even if its path changes, the work stays in this folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None  # stays None on Windows, which uses paths
        if _CAN_WORK_BELOW_DESCRIPTORS:
            self._descriptor = os.open(path, _FOLDER_FLAGS)

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def where(self) -> Path:
        """The real path of this folder at this moment."""
        return _where(self._descriptor, self._path)

    def descend(self, name: str) -> None:
        """Open the folder of this name inside this one, and create it if it is missing."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._at(name), dir_fd=self._descriptor)
        if self._descriptor is not None:
            below = os.open(name, _FOLDER_FLAGS, dir_fd=self._descriptor)
            os.close(self._descriptor)
            self._descriptor = below
        self._path /= name

    def add(self, names: Iterable[str], data: bytes) -> str:
        """Add a file under the first free name, and return this name."""
        with self._complete(data) as source:
            for name in names:
                with contextlib.suppress(FileExistsError):
                    self._link(source, name)
                    self._sync()
                    return name
        raise FileExistsError

    def replace(self, name: str, data: bytes) -> None:
        """Write a file under this name, replacing an existing one."""
        with self._complete(data) as source, self._removed_at_the_end(_temporary()) as temporary:
            self._link(source, temporary)
            os.replace(
                self._at(temporary),
                self._at(name),
                src_dir_fd=self._descriptor,
                dst_dir_fd=self._descriptor,
            )
            self._sync()

    @contextlib.contextmanager
    def _complete(self, data: bytes) -> Iterator[str]:
        """The content on disk, but not yet published; yields what to link from.

        On Linux the file has no name and disappears with the process, even if it is killed.
        """
        unnamed = self._open_unnamed()
        if unnamed is not None:
            with os.fdopen(unnamed, "wb", buffering=0):
                _write(unnamed, data)
                yield f"{_OWN_DESCRIPTORS}/{unnamed}"
            return
        with self._removed_at_the_end(_temporary()) as temporary:
            descriptor = os.open(
                self._at(temporary),
                _WRITE_FLAGS | os.O_CREAT | os.O_EXCL,
                0o666,
                dir_fd=self._descriptor,
            )
            with os.fdopen(descriptor, "wb", buffering=0):
                _write(descriptor, data)
            yield temporary

    def _open_unnamed(self) -> int | None:
        if not _O_TMPFILE or self._descriptor is None or not Path(_OWN_DESCRIPTORS).is_dir():
            return None
        try:
            return os.open(".", _WRITE_FLAGS | _O_TMPFILE, 0o666, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                return None  # this file system does not support unnamed files
            raise

    def _link(self, source: str, name: str) -> None:
        """Give the content this name; raises FileExistsError, race-free, if it is taken."""
        try:
            os.link(
                self._at(source),
                self._at(name),
                src_dir_fd=self._descriptor,
                dst_dir_fd=self._descriptor,
            )
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            self._reserve_and_move(source, name)

    def _reserve_and_move(self, source: str, name: str) -> None:
        """Reserve the name first, atomically, then write the content there."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.close(os.open(self._at(name), flags, 0o666, dir_fd=self._descriptor))
        try:
            os.replace(
                self._at(source),
                self._at(name),
                src_dir_fd=self._descriptor,
                dst_dir_fd=self._descriptor,
            )
        except OSError:
            os.unlink(self._at(name), dir_fd=self._descriptor)
            raise

    @contextlib.contextmanager
    def _removed_at_the_end(self, name: str) -> Iterator[str]:
        try:
            yield name
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._at(name), dir_fd=self._descriptor)

    def _sync(self) -> None:
        # The file is published and complete; a folder that cannot be synced does not undo that.
        with contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.fsync(self._descriptor)

    def _at(self, name: str) -> str:
        return name if self._descriptor is not None else str(self._path / name)


def stem_of(text: str) -> str:
    """A name derived from the start of a text: "A red fox, at night" is `a-red-fox-at-night`."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())
    stem = ""
    for word in words:
        longer = f"{stem}-{word}" if stem else _cut(word, MAX_STEM_BYTES)
        if len(os.fsencode(longer)) > MAX_STEM_BYTES:
            break
        stem = longer
    return stem or "generated"


def _open_regular(real: Path, path: str) -> int:
    try:
        # Check before opening: opening a device or a pipe can have side effects.
        _check_regular(real.stat(), path)
        return os.open(real, _READ_FLAGS)
    except PermissionError:
        raise ImageFileNotFoundError(f"{path} (no permission to read it)") from None
    except OSError:
        raise ImageFileNotFoundError(path) from None


def _check_regular(found: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ImageFileNotFoundError(f"{path} (it is a folder)")
    if not stat.S_ISREG(found.st_mode):
        raise PathNotAllowedError(f"{path} is not a regular file")


def _check_not_input(output: Output, name: str) -> None:
    if _identity(output.folder / name) in output.inputs:
        raise OutputExistsError(f"{output.shown_folder / name} is an input and stays as it is")


def _check_folder(output: Output) -> None:
    """Raise an error before the edit if a folder cannot take the result."""
    existing = nearest_existing(output.folder)
    if not existing.is_dir():
        raise OutputNotWritableError(f"{output.shown} ({existing.name} is not a folder)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputNotWritableError(f"{output.shown} (no permission)")


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _not_allowed(path: str) -> PathNotAllowedError:
    return PathNotAllowedError(f"{path} is not inside the allowed folders (ALLOWED_DIRS)")


def _not_writable(output: Output, error: OSError) -> OutputNotWritableError:
    if error.errno in _NO_SPACE:
        return NoSpaceError(f"{output.shown} (no space left)")
    reason = os.strerror(error.errno).lower() if error.errno else "the system refuses"
    return OutputNotWritableError(f"{output.shown} ({reason})")


def _absolute(path: str) -> Path:
    """The absolute path without `..`, with links unresolved, so that its author recognises it."""
    absolute = Path(expanded(path)).absolute()
    if absolute.name == "..":
        return _real(path)
    if ".." in absolute.parts:  # `link/..` is relative to the target of the link
        return Path(os.path.realpath(absolute.parent)) / absolute.name
    return absolute


def _real(path: str) -> Path:
    try:
        return Path(os.path.realpath(expanded(path)))
    except UnicodeEncodeError:  # half of a surrogate pair, which no name can contain
        raise OSError(errno.EILSEQ, os.strerror(errno.EILSEQ)) from None


def expanded(path: str) -> str:
    """The path for `~` or for a link such as `file:///home/ada/cat.png`."""
    host, slash, rest = path[len(_LINK) :].partition("/")
    if path[: len(_LINK)].lower() == _LINK and slash and host.lower() in ("", "localhost"):
        return url2pathname(slash + rest)
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib's raises for `~unknown`


def _alike(real: Path) -> Path | None:
    """The one file in the same folder whose name looks the same."""
    try:
        names = os.listdir(real.parent)  # noqa: PTH208 - names are all that is looked at
    except OSError:
        return None
    appearance = _appearance(real.name)
    found = [name for name in names if _appearance(name) == appearance]
    return real.parent / found[0] if len(found) == 1 else None


def _appearance(name: str) -> str:
    """A name as it looks: one kind of space and of hyphen, nothing invisible."""
    seen = unicodedata.normalize("NFC", name)
    return "".join(
        " " if letter.isspace() else "-" if letter in _HYPHENS else letter
        for letter in seen
        if unicodedata.category(letter) != "Cf"
    )


def _where(descriptor: int | None, path: Path) -> Path:
    """The real path of an open file or folder; by its path if the system cannot report it."""
    if descriptor is not None:
        with contextlib.suppress(OSError):
            return Path(f"{_OWN_DESCRIPTORS}/{descriptor}").readlink()
    return Path(os.path.realpath(path))


def _identity(path: Path) -> FileIdentity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return FileIdentity(found.st_dev, found.st_ino)


def nearest_existing(folder: Path) -> Path:
    """The folder itself if it exists, or its nearest existing parent."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _temporary() -> str:
    return f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}_{number}"


def _cut(text: str, max_bytes: int) -> str:
    """The start of a name, cut between characters."""
    return os.fsencode(text)[:max_bytes].decode("utf-8", errors="ignore")


def _folded(path: Path) -> str:
    """Equal for names that some file systems do not tell apart."""
    return unicodedata.normalize("NFC", str(path)).casefold()
