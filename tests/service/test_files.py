"""Inputs are read only where allowed and never changed; outputs are complete or absent."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import step1x_edit.service.files
from step1x_edit.errors import (
    ImageFileNotFoundError,
    ImageTooLargeError,
    InvalidParameterError,
    NoSpaceError,
    OutputError,
    OutputExistsError,
    OutputNotWritableError,
    PathNotAllowedError,
    Step1XEditError,
)
from step1x_edit.service.files import FileAccess

posix = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and permissions")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def files(root: Path) -> FileAccess:
    return FileAccess([root], max_bytes=1000)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def without_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step1x_edit.service.files, "_O_TMPFILE", 0)


# --- reading ---


def test_a_regular_file_is_read(files: FileAccess, root: Path) -> None:
    (root / "cat.png").write_bytes(b"cat")
    found = files.read(str(root / "cat.png"))
    assert (found.data, found.path) == (b"cat", root / "cat.png")


def test_a_relative_path_starts_here(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "cat.png").write_bytes(b"cat")
    monkeypatch.chdir(root)
    assert files.read("cat.png").path == root / "cat.png"


def test_tilde_is_the_home_folder(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "cat.png").write_bytes(b"cat")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    assert files.read("~/cat.png").data == b"cat"
    assert files.plan_output("~/new.png", []).folder == root


def test_a_missing_file_is_named_as_it_was_written(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(ImageFileNotFoundError) as caught:
        files.read("nope.jpg")
    assert str(caught.value) == "Image file not found: nope.jpg"


NARROW = "\u202f"  # what macOS puts before AM and PM in the names of screenshots


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        (f"Screenshot 3.14.15{NARROW}PM.png", "Screenshot 3.14.15 PM.png"),
        ("a b.png", f"a{NARROW}b.png"),
        ("a\u00a0b\u3000c.png", "a b c.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("a\u200bb.png", "ab.png"),
        ("a\u2011b.png", "a-b.png"),
    ],
)
def test_a_file_is_found_by_a_name_that_looks_the_same(
    files: FileAccess, root: Path, on_disk: str, written: str
) -> None:
    (root / on_disk).write_bytes(b"cat")
    other = (root / "other.png").write_bytes(b"dog")
    assert other
    found = files.read(str(root / written))
    assert found.data == b"cat"
    assert files.identify([str(root / written)]) == {found.identity}


@pytest.mark.parametrize("on_disk", ["photo².png", "photo①.png", "\ufb01le2.png", "photo_2.png"])
def test_a_file_whose_name_looks_different_is_another_file(
    files: FileAccess, root: Path, on_disk: str
) -> None:
    (root / on_disk).write_bytes(b"cat")
    for written in ("photo2.png", "photo1.png", "file2.png", "photo-2.png"):
        with pytest.raises(ImageFileNotFoundError):
            files.read(str(root / written))


def test_an_exact_name_wins_and_nothing_is_guessed_between_two(
    files: FileAccess, root: Path
) -> None:
    (root / "a b.png").write_bytes(b"exact")
    (root / f"a{NARROW}b.png").write_bytes(b"narrow")
    assert files.read(str(root / "a b.png")).data == b"exact"
    with pytest.raises(ImageFileNotFoundError):
        files.read(str(root / "a\u00a0b.png"))
    with pytest.raises(ImageFileNotFoundError):
        files.read(str(root / "a c.png"))


@posix
def test_the_file_that_looks_the_same_has_to_be_allowed(
    files: FileAccess, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / f"b{NARROW}c.png").write_bytes(b"secret")
    (root / f"a{NARROW}b.png").symlink_to(tmp_path / "secret.png")
    for written in (root / "a b.png", tmp_path / "b c.png"):
        with pytest.raises(PathNotAllowedError):
            files.read(str(written))


def test_an_output_is_never_guessed(files: FileAccess, root: Path) -> None:
    (root / f"a{NARROW}b.png").write_bytes(b"stays")
    output = files.plan_output(str(root / "a b.png"), (), overwrite=True)
    assert files.publish(output, b"new") == root / "a b.png"
    assert (root / f"a{NARROW}b.png").read_bytes() == b"stays"


@pytest.mark.parametrize("name", ["a b#c?.png", "ü%20.png"])
def test_the_link_of_a_file_is_its_path(files: FileAccess, root: Path, name: str) -> None:
    (root / name).write_bytes(b"cat")
    link = (root / name).as_uri()
    assert files.read(link).data == b"cat"
    assert files.read(link.replace("file://", "FILE://localhost")).data == b"cat"
    with pytest.raises(PathNotAllowedError):
        files.read((root / ".." / name).as_uri())
    with pytest.raises(PathNotAllowedError):
        files.read(link + "%00")


@pytest.mark.parametrize("half", ["\ud83c", "a\ud800b.png"])
def test_half_of_a_surrogate_pair_is_just_not_found(
    files: FileAccess, root: Path, half: str
) -> None:
    with pytest.raises(ImageFileNotFoundError):
        files.read(str(root / half))
    with pytest.raises(OutputNotWritableError):
        files.plan_output(str(root / f"{half}.png"), ())
    assert files.identify([str(root / half)]) == frozenset()


def test_a_path_that_changes_while_it_is_followed_is_not_found(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "link.png").symlink_to(root / "cat.png")
    (root / "cat.png").write_bytes(b"cat")

    def gone(*arguments: object, **options: object) -> str:
        raise OSError(errno.EINVAL, "Invalid argument")  # what was a link is a file by now

    monkeypatch.setattr(os, "readlink", gone)
    monkeypatch.setattr(os.path, "realpath", gone)
    with pytest.raises(ImageFileNotFoundError, match=r"link\.png$"):
        files.read(str(root / "link.png"))
    assert files.identify([str(root / "link.png")]) == frozenset()
    with pytest.raises(OutputNotWritableError):
        files.plan_output(str(root / "out.png"), ())


def test_a_folder_is_no_image(files: FileAccess, root: Path) -> None:
    with pytest.raises(ImageFileNotFoundError, match="it is a folder"):
        files.read(str(root))


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".png", "sub/../../root/nope.png", "~nobody-here/x.png"]
)
def test_odd_names_are_just_not_found(
    files: FileAccess, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(ImageFileNotFoundError):
        files.read(name)


def test_outside_is_refused_alike_whether_or_not_it_exists(
    files: FileAccess, tmp_path: Path
) -> None:
    (tmp_path / "there.png").write_bytes(b"secret")
    sentences = set()
    for name in ("there.png", "nope.png"):
        with pytest.raises(PathNotAllowedError) as caught:
            files.read(str(tmp_path / name))
        sentences.add(str(caught.value).replace(name, "NAME"))
    assert len(sentences) == 1


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/../there.png", "{root}evil/x.png", "a\0b"])
def test_ways_out_are_refused(files: FileAccess, root: Path, path: str) -> None:
    (root.parent / "there.png").write_bytes(b"secret")
    (root.parent / "rootevil").mkdir()
    (root.parent / "rootevil/x.png").write_bytes(b"secret")
    written = path.format(root=root)
    with pytest.raises(PathNotAllowedError):
        files.read(written)
    with pytest.raises(PathNotAllowedError):
        files.plan_output(written, [])


@posix
def test_a_link_that_leads_outside_is_refused(files: FileAccess, root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    (root / "file.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    for path in (root / "file.png", root / "folder" / "secret.png"):
        with pytest.raises(PathNotAllowedError) as caught:
            files.read(str(path))
        assert "outside/" not in str(caught.value)
        with pytest.raises(PathNotAllowedError):
            files.plan_output(str(path), [], overwrite=True)
    with pytest.raises(PathNotAllowedError):
        files.plan_default_output(str(root / "a.png"), [], output_dir=str(root / "folder/new"))
    assert listing(outside) == {"secret.png"}


@posix
def test_a_link_that_stays_inside_is_followed(files: FileAccess, root: Path) -> None:
    (root / "real.png").write_bytes(b"cat")
    (root / "link.png").symlink_to("real.png")
    found = files.read(str(root / "link.png"))
    assert (found.data, found.path.name) == (b"cat", "link.png")


@posix
@pytest.mark.timeout(20)
def test_exchanging_a_link_under_the_reader_never_shows_what_is_outside(
    files: FileAccess, root: Path
) -> None:
    (root.parent / "secret.png").write_bytes(b"secret")
    (root / "sound.png").write_bytes(b"sound")
    target, stop = root / "x.png", threading.Event()
    target.symlink_to("sound.png")

    def swap() -> None:
        while not stop.is_set():
            for goal in ("../secret.png", "sound.png"):
                (root / "next").symlink_to(goal)
                (root / "next").replace(target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        for _ in range(1000):
            try:
                seen.add(files.read(str(target)).data)
            except (PathNotAllowedError, ImageFileNotFoundError):
                seen.add(b"refused")
    finally:
        stop.set()
        swapper.join()
    assert seen
    assert seen <= {b"sound", b"refused"}


@posix
def test_a_folder_exchanged_before_the_file_is_opened_is_noticed(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = root.parent / "outside"
    for folder, content in ((outside, b"secret"), (root / "a", b"sound")):
        folder.mkdir()
        (folder / "x.png").write_bytes(content)
    really_open = os.open

    def exchange_and_open(*args: Any, **kwargs: Any) -> int:
        (root / "a").rename(root / "moved")
        (root / "a").symlink_to(outside)
        return really_open(*args, **kwargs)

    monkeypatch.setattr(os, "open", exchange_and_open)
    with pytest.raises(PathNotAllowedError):
        files.read(str(root / "a/x.png"))


@posix
@pytest.mark.timeout(5)
def test_pipes_sockets_and_devices_are_refused_without_waiting(root: Path) -> None:
    everywhere = FileAccess([Path("/")], max_bytes=1000)
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.png"))
        for path in (str(root / "pipe.png"), str(root / "s.png"), "/dev/zero"):
            with pytest.raises(PathNotAllowedError, match="not a regular file"):
                everywhere.read(path)


def test_a_long_file_is_refused_before_it_is_read(files: FileAccess, root: Path) -> None:
    with (root / "sparse.png").open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ImageTooLargeError):
        files.read(str(root / "sparse.png"))


def test_a_file_that_grows_is_not_read_without_end(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "log.png").write_bytes(b"x")
    monkeypatch.setattr(os, "read", lambda *_: b"x" * 100)
    with pytest.raises(ImageTooLargeError):
        files.read(str(root / "log.png"))


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(files: FileAccess, root: Path) -> None:
    (root / "cat.png").write_bytes(b"cat")
    (root / "cat.png").chmod(0)
    with pytest.raises(ImageFileNotFoundError, match="no permission"):
        files.read(str(root / "cat.png"))


# --- naming ---


@pytest.mark.parametrize(
    ("image", "result"),
    [
        ("cat.jpg", "cat_edited.jpg"),
        ("cat.PNG", "cat_edited.PNG"),
        ("cat.gif", "cat_edited.png"),
        ("cat", "cat_edited.png"),
        ("cat.tar.webp", "cat.tar_edited.webp"),
        (".png", ".png_edited.png"),
    ],
)
def test_the_default_output_lies_beside_the_input(
    files: FileAccess, root: Path, image: str, result: str
) -> None:
    output = files.plan_default_output(str(root / image), [])
    assert files.publish(output, b"new") == root / result
    assert (root / result).read_bytes() == b"new"


def test_the_default_output_is_numbered_when_taken(files: FileAccess, root: Path) -> None:
    (root / "cat_edited.png").write_bytes(b"mine")
    names = [
        files.publish(files.plan_default_output(str(root / "cat.png"), []), b"new").name
        for _ in range(2)
    ]
    assert names == ["cat_edited_2.png", "cat_edited_3.png"]
    assert (root / "cat_edited.png").read_bytes() == b"mine"


def test_the_default_output_is_replaced_when_asked(files: FileAccess, root: Path) -> None:
    (root / "cat_edited.png").write_bytes(b"old")
    output = files.plan_default_output(str(root / "cat.png"), [], overwrite=True)
    assert files.publish(output, b"new").name == "cat_edited.png"
    assert (root / "cat_edited.png").read_bytes() == b"new"


def test_a_folder_in_the_place_of_the_default_output_is_told_before_the_work(
    files: FileAccess, root: Path
) -> None:
    (root / "cat_edited.png").mkdir()
    with pytest.raises(OutputNotWritableError, match="it is a folder"):
        files.plan_default_output(str(root / "cat.png"), [], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_equal_names_of_a_batch_are_numbered(
    files: FileAccess, root: Path, overwrite: bool
) -> None:
    taken: set[str] = set()
    images = ["a/cat.png", "b/cat.png", "c/CAT.png"]
    outputs = [
        files.plan_default_output(
            str(root / image), [], output_dir=str(root / "out"), overwrite=overwrite, taken=taken
        )
        for image in images
    ]
    names = [files.publish(output, b"new").name for output in outputs]
    assert names == ["cat_edited.png", "cat_edited_2.png", "CAT_edited_3.png"]


def test_a_default_name_never_falls_on_an_input_of_the_batch(files: FileAccess, root: Path) -> None:
    images = [str(root / "cat.png"), str(root / "cat_edited.png")]
    for image in images:
        Path(image).write_bytes(b"input")
    inputs = files.identify(images)
    assert len(inputs) == 2
    output = files.plan_default_output(images[0], inputs, overwrite=True)
    assert files.publish(output, b"new").name == "cat_edited_2.png"
    assert (root / "cat_edited.png").read_bytes() == b"input"


@pytest.mark.parametrize("letter", ["x", "字", "🎩"])
def test_default_names_fit_into_255_bytes(files: FileAccess, root: Path, letter: str) -> None:
    stem = letter * (250 // len(letter.encode()))
    for _ in range(2):
        name = files.publish(files.plan_default_output(str(root / f"{stem}.png"), []), b"").name
        assert len(name.encode()) <= 255
        assert name.startswith(letter * 50)
        assert name.endswith(("_edited.png", "_edited_2.png"))


# --- the named output ---


def test_a_named_output_goes_where_it_was_asked_for(files: FileAccess, root: Path) -> None:
    output = files.plan_output(str(root / "new/deep/x.webp"), [])
    assert listing(root) == set()
    assert files.publish(output, b"new") == root / "new/deep/x.webp"
    assert (root / "new/deep/x.webp").read_bytes() == b"new"


def test_an_existing_output_is_refused(files: FileAccess, root: Path) -> None:
    (root / "x.png").write_bytes(b"mine")
    with pytest.raises(OutputExistsError) as caught:
        files.plan_output(str(root / "x.png"), [])
    assert str(caught.value) == f"Output already exists: {root / 'x.png'}"


def test_an_existing_output_is_replaced_when_asked(files: FileAccess, root: Path) -> None:
    (root / "x.png").write_bytes(b"old")
    files.publish(files.plan_output(str(root / "x.png"), [], overwrite=True), b"new")
    assert (root / "x.png").read_bytes() == b"new"
    assert listing(root) == {"x.png"}


@posix
def test_a_dangling_link_is_not_written_through(files: FileAccess, root: Path) -> None:
    (root / "x.png").symlink_to("elsewhere.png")
    with pytest.raises(OutputExistsError):
        files.plan_output(str(root / "x.png"), [])
    files.publish(files.plan_output(str(root / "x.png"), [], overwrite=True), b"new")
    assert listing(root) == {"x.png"}


@posix
@pytest.mark.parametrize("name", ["cat.png", "./sub/../cat.png", "hard.png", "soft.png"])
def test_an_output_that_is_an_input_is_always_refused(
    files: FileAccess, root: Path, name: str
) -> None:
    (root / "sub").mkdir()
    cat = root / "cat.png"
    cat.write_bytes(b"cat")
    (root / "hard.png").hardlink_to(cat)
    (root / "soft.png").symlink_to("cat.png")
    inputs = [files.read(str(cat)).identity]
    with pytest.raises(OutputExistsError, match="is an input"):
        files.plan_output(f"{root}/{name}", inputs, overwrite=True)
    assert cat.read_bytes() == b"cat"


def test_an_output_that_becomes_an_input_meanwhile_is_refused(
    files: FileAccess, root: Path
) -> None:
    cat = root / "cat.png"
    cat.write_bytes(b"cat")
    output = files.plan_output(str(root / "x.png"), files.identify([str(cat)]), overwrite=True)
    (root / "x.png").hardlink_to(cat)
    with pytest.raises(OutputExistsError, match="is an input"):
        files.publish(output, b"new")
    assert cat.read_bytes() == b"cat"


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt", ".png", "x.svg"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(
    files: FileAccess, root: Path, name: str
) -> None:
    with pytest.raises(InvalidParameterError, match=r"\.png, \.jpg, .*\.bmp") as caught:
        files.plan_output(str(root / name), [])
    assert str(caught.value).startswith("Invalid parameter: output_path must end in ")


def test_a_folder_or_a_file_in_the_way_is_found_beforehand(files: FileAccess, root: Path) -> None:
    (root / "folder.png").mkdir()
    (root / "file").write_bytes(b"")
    for path in ("folder.png", "file/x.png", "file/new/x.png", "x" * 260 + ".png"):
        with pytest.raises(OutputNotWritableError, match=r"^Cannot write output: "):
            files.plan_output(str(root / path), [])


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_beforehand(files: FileAccess, root: Path) -> None:
    root.chmod(0o500)
    with pytest.raises(OutputNotWritableError, match="no permission"):
        files.plan_output(str(root / "x.png"), [])


# --- publishing ---


@pytest.mark.parametrize("named", [False, True])
def test_of_many_publishers_of_one_name_one_wins(
    files: FileAccess, root: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        without_unnamed_files(monkeypatch)
    outputs = [files.plan_output(str(root / "x.png"), []) for _ in range(32)]
    results = at_once(
        [partial(files.publish, output, b"%d" % i) for i, output in enumerate(outputs)]
    )
    winners = [i for i, result in enumerate(results) if isinstance(result, Path)]
    assert len(winners) == 1
    assert (root / "x.png").read_bytes() == b"%d" % winners[0]
    assert all(isinstance(result, Path | OutputExistsError) for result in results)
    assert listing(root) == {"x.png"}


@pytest.mark.parametrize("named", [False, True])
def test_many_publishers_of_a_default_name_get_a_name_each(
    files: FileAccess, root: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        without_unnamed_files(monkeypatch)
    output = files.plan_default_output(str(root / "cat.png"), [])
    results = at_once([partial(files.publish, output, b"%d" % i) for i in range(32)])
    contents = {Path(str(result)).read_bytes() for result in results}
    assert contents == {b"%d" % i for i in range(32)}
    assert len(listing(root)) == 32


def at_once(calls: list[Callable[[], Path]]) -> list[Path | Step1XEditError]:
    """Start all calls together and return what each gave or raised."""
    barrier = threading.Barrier(len(calls))
    results: dict[int, Path | Step1XEditError] = {}

    def run(i: int, call: Callable[[], Path]) -> None:
        barrier.wait()
        try:
            results[i] = call()
        except Step1XEditError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(calls))]


@posix
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_content_is_on_the_disk_before_it_gets_its_name(
    files: FileAccess,
    root: Path,
    overwrite: bool,
    named: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if named:
        without_unnamed_files(monkeypatch)
    output = files.plan_output(str(root / "x.png"), [], overwrite=overwrite)
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kw: Any) -> Any:
            calls.append(name)
            return real(*args, **kw)

        return call

    for name in ("write", "fsync", "link", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    files.publish(output, b"new")
    # The last one makes the name itself durable.
    assert calls == ["write", "fsync", "link", *(["replace"] if overwrite else []), "fsync"]


STEPS = ["open", "write", "fsync", "link", "replace", "mkdir"]


@posix
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_fault_at_any_step_leaves_all_or_nothing(
    files: FileAccess,
    root: Path,
    overwrite: bool,
    named: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Let the n-th system call fail, for n = 1, 2, 3 … until none is left to fail."""
    if named:
        without_unnamed_files(monkeypatch)
    for n in range(1, 50):
        folder = root / f"case{n}"
        folder.mkdir()
        target = folder / ("x.png" if overwrite else "new/x.png")
        if overwrite:
            target.write_bytes(b"old")
        output = files.plan_output(str(target), [], overwrite=overwrite)
        with monkeypatch.context() as patch:
            fired = fail_at(n, code, patch)
            failure = None
            try:
                files.publish(output, b"new" * 100)
            except OutputError as error:
                failure = error
        if failure is not None:
            assert isinstance(failure, NoSpaceError) == (code == errno.ENOSPC)
            assert str(failure).startswith(f"Cannot write output: {target}")
        before = {"x.png"} if overwrite else set()
        found = {name for name in listing(folder) if name != "new"}
        if target.exists():
            assert target.read_bytes() in (
                (b"new" * 100,) if failure is None else (b"old", b"new" * 100)
            )
            assert found == {str(target.relative_to(folder))}
        else:
            assert failure is not None
            assert found == before
        if not fired():
            assert failure is None
            assert n > 4
            return
    pytest.fail("the faults never ended")


def fail_at(n: int, code: int, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Make the n-th of the steps fail; the returned function tells whether it came to that."""
    calls = 0

    def faulty(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == n:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    supported = step1x_edit.service.files._CAN_WORK_BELOW_DESCRIPTORS
    assert supported
    for name in STEPS:
        patch.setattr(os, name, faulty(getattr(os, name)))
    return lambda: calls >= n


@posix
def test_without_hard_links_nothing_is_overwritten_either(
    files: FileAccess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_unnamed_files(monkeypatch)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    output = files.plan_output(str(root / "x.png"), [])
    monkeypatch.setattr(os, "link", refuse)
    files.publish(output, b"first")
    with pytest.raises(OutputExistsError):
        files.publish(output, b"second")
    assert (root / "x.png").read_bytes() == b"first"
    assert listing(root) == {"x.png"}


@posix
@pytest.mark.parametrize("exchanged", ["a", "a/b"])
def test_a_folder_exchanged_meanwhile_does_not_lead_outside(
    files: FileAccess, root: Path, exchanged: str
) -> None:
    outside = root.parent / "outside"
    (outside / "b").mkdir(parents=True)
    (root / "a/b").mkdir(parents=True)
    output = files.plan_output(str(root / "a/b/x.png"), [])
    (root / exchanged).rename(root / "moved")
    (root / exchanged).symlink_to(outside)
    with pytest.raises((PathNotAllowedError, OutputNotWritableError)):
        files.publish(output, b"new")
    assert listing(outside) == {"b"}


@pytest.mark.skipif(sys.platform != "linux", reason="files without a name are Linux's")
def test_a_killed_publisher_leaves_nothing(root: Path) -> None:
    """The process dies after the data is on the disk and before it gets its name."""
    code = """
import os, signal, sys
from pathlib import Path
import step1x_edit.service.files as files
access = files.FileAccess([Path(sys.argv[1])], 1000)
output = access.plan_output(sys.argv[1] + "/x.png", [])
files.os.link = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
access.publish(output, b"new" * 100)
"""
    source = Path(step1x_edit.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", code, str(root)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert listing(root) == set()
