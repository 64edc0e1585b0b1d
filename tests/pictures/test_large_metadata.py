"""Metadata that is said to hold much more than its file: it is left out, and the picture is read.

Unguarded, each of these files of at most 1 MB takes 28 to 180 MB.
"""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pillow_heif
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from conftest import MakeService
from picture_files import scene, tiff
from step1x_edit.errors import CorruptImageError
from step1x_edit.pictures.images import decode, format_of, read_record
from step1x_edit.settings import Limits

SCENE = scene()
LONG, RATIONAL, UNDEFINED = 4, 5, 7
EXIF, INTEROP = ExifTags.IFD.Exif, ExifTags.IFD.Interop

Entry = tuple[int, int, int, int]


def read_in_little_memory(data: bytes) -> None:
    """Read the picture, its format and its record, as `inspect` does."""
    tracemalloc.start()
    try:
        assert decode(data, Limits(2**25, 50_000_000)).pixels.shape == SCENE.shape
        assert format_of(data)
        assert read_record(data) is None
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


def directory(*entries: Entry) -> bytes:
    packed = [struct.pack("<HHII", *entry) for entry in entries]
    return struct.pack("<H", len(packed)) + b"".join(packed) + bytes(4)


def overlapping(size: int = 100_000) -> list[Entry]:
    return [(50_000 + index, UNDEFINED, size, 8) for index in range(900)]


def exif(entries: list[Entry], *path: int, size: int = 100_000) -> bytes:
    """EXIF with these entries in the directory at a path of tags, and room for their values."""
    data = struct.pack("<2sHI", b"II", 42, 8)
    for tag in path:
        data += directory((tag, LONG, 1, len(data) + len(directory((0, 0, 0, 0)))))
    return data + directory(*entries) + size * b"\1"


# --- files ---


def saved(name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(SCENE).save(buffer, name, **options)
    return buffer.getvalue()


def in_png(block: bytes) -> bytes:
    return saved("PNG", exif=block)


def in_png_as_text(block: bytes) -> bytes:
    """As ImageMagick wrote EXIF before PNG had a chunk for it."""
    chunks = PngInfo()
    chunks.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}")
    return saved("PNG", pnginfo=chunks)


def in_jpeg(block: bytes) -> bytes:
    """In two segments, which Pillow joins; without a density, which Pillow then looks for."""
    plain = saved("JPEG")
    (length,) = struct.unpack_from(">H", plain, 4)
    return plain[:2] + in_segments(block) + plain[4 + length :]


def in_mpo(block: bytes) -> bytes:
    plain = saved("MPO", save_all=True, append_images=[Image.fromarray(SCENE)])
    return plain[:2] + in_segments(block) + plain[2:]


def in_segments(block: bytes) -> bytes:
    parts = [block[at : at + 65_000] for at in range(0, len(block), 65_000)]
    return b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def in_webp(block: bytes) -> bytes:
    return saved("WEBP", exif=block)


def in_avif(block: bytes) -> bytes:
    return saved("AVIF", exif=block)


def in_heic(block: bytes) -> bytes:
    pillow_heif.register_heif_opener()
    return saved("HEIF", exif=block)


FORMATS = [in_png, in_png_as_text, in_jpeg, in_mpo, in_webp, in_avif, in_heic]


# --- tests ---


@pytest.mark.parametrize("path", [(), (EXIF,), (EXIF, INTEROP)], ids=["image", "exif", "interop"])
@pytest.mark.parametrize("stored", FORMATS)
def test_values_that_overlap(stored: Callable[[bytes], bytes], path: tuple[int, ...]) -> None:
    read_in_little_memory(stored(exif(overlapping(), *path)))


def test_values_that_overlap_in_the_exif_of_a_tiff() -> None:
    plain = tiff(SCENE, photometric="rgb", extratags=[(65_000, "I", 1, 0, True)])
    other, named = (
        struct.pack("<HHII", 65_000, LONG, 1, 0),
        struct.pack("<HHII", EXIF, LONG, 1, len(plain)),
    )
    plain = plain.replace(other, named)
    read_in_little_memory(plain + directory(*overlapping()) + bytes(100_000))


def test_values_that_overlap_in_the_index_of_an_mpo() -> None:
    index = exif(overlapping(50_000), size=50_000)
    plain = saved("JPEG")
    read_in_little_memory(plain[:2] + segment(0xE2, b"MPF\0" + index) + plain[2:])


@pytest.mark.parametrize("path", [(), (EXIF,)], ids=["image", "exif"])
def test_numbers_that_take_many_times_their_size(path: tuple[int, ...]) -> None:
    size = 1_000_000
    read_in_little_memory(in_png(exif([(50_000, RATIONAL, size // 8, 8)], *path, size=size)))


def test_a_directory_with_more_entries_than_any_real_one() -> None:
    entries = [(index, UNDEFINED, 40_000, 8) for index in range(2000)]
    read_in_little_memory(in_png(exif(entries, size=40_000)))


def test_a_comment_that_is_a_number() -> None:
    """Of which Python would make that many zeros."""
    read_in_little_memory(in_png(exif([(ExifTags.Base.UserComment, LONG, 1, 50_000_000)], EXIF)))


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("prefix", ["a", "a" * 150])
@pytest.mark.parametrize("names", ["<{}:b{} />", "{}:b{}=''"], ids=["elements", "attributes"])
def test_names_in_xmp_that_each_contain_a_long_one(names: str, prefix: str, quote: str) -> None:
    """The names of namespaces are part of all names in them."""
    start = f"<x xmlns:{prefix} = {quote}{20_000 * 'u'}{quote}>"
    each = " ".join(names.format(prefix, index) for index in range(2000))
    packet = f"{start}{each}</x>" if "<" in names else f"{start}<y {each}/></x>"
    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", packet)
    read_in_little_memory(saved("PNG", pnginfo=chunks))


# --- many pictures in one HEIC -------------------------------------------------------------------

PICTURES = 40


def many_pictures(first: int, profile: bytes | None = None) -> bytes:
    """A HEIC with EXIF in each picture, of this length in the first one."""
    file = pillow_heif.HeifFile()
    for number in range(PICTURES):
        file.add_from_pillow(Image.fromarray(SCENE))
        file[number].info["exif"] = b"Exif\0\0II*\0" + bytes(first if number == 0 else 40)
        file[number].info["icc_profile"] = profile
    file.save(buffer := io.BytesIO(), save_all=True)
    return buffer.getvalue()


def with_shared_exif(data: bytes) -> bytes:
    """The same where the EXIF of every picture is that of the first one."""
    changed, at = bytearray(data), data.index(b"iloc") + 12
    entries = range(at, at + 2 * PICTURES * 18, 18)
    longest = max(entries, key=lambda entry: data[entry + 14 : entry + 18])
    for entry in entries:
        if data[entry + 1] % 2 == 0:  # the items of pictures have odd numbers
            changed[entry + 2 : entry + 18] = data[longest + 2 : longest + 18]
    return bytes(changed)


async def test_a_heic_whose_pictures_share_their_exif_is_refused(make_service: MakeService) -> None:
    whole = many_pictures(500_000)
    await make_service().check_picture(whole)

    with pytest.raises(CorruptImageError, match="the parts of the HEIC overlap"):
        await make_service().check_picture(with_shared_exif(whole))


def test_only_the_main_picture_of_a_heic_is_read() -> None:
    read_in_little_memory(with_shared_exif(many_pictures(100_000)))  # 4 MB more than its bytes
