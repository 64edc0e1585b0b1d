"""Files of other programs: what the result shows, says and keeps, at the door of the service."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import ExifTags, Image

from conftest import MakeService, edits_of
from fakes import FakeWorker, canvas
from picture_files import (
    ADOBE_RGB,
    BT_2020,
    DISPLAY_P3,
    INKS_L,
    ByteOrder,
    Pixels,
    cicp,
    cmyk_profile,
    difference,
    encoded,
    grey_profile,
    hlg,
    in_primaries,
    levels,
    linear,
    packed_tiff,
    png,
    pq,
    rgb_profile,
    scene,
    seen,
    swapped_profile,
    tiff,
    tiff_of_planes,
    with_nclx,
)
from step1x_edit.errors import CorruptImageError, UnsupportedImageError
from step1x_edit.pictures import provenance
from step1x_edit.pictures.images import decode, read_record
from step1x_edit.pictures.tiff import image_of, opened
from step1x_edit.settings import Limits

SCENE = scene()
SCENE_16 = SCENE.astype(np.uint16) * 257
GREY = SCENE[:, :, 0]
GREY_16 = GREY.astype(np.uint16) * 257
GREY_SEEN = np.repeat(GREY[:, :, None], 3, axis=2)
LOSSY = 3  # levels that a good JPEG or AVIF may be off, on average

Edited = Callable[..., Any]


class Result:
    """The file that an edit which paints nothing has made of another file."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self.warning = metadata.get("warning")
        self.seen = seen(path)
        with Image.open(path) as image:
            image.load()
            self.mode = image.mode
            self.info = image.info
            self.exif = {**image.getexif(), **image.getexif().get_ifd(ExifTags.IFD.Exif)}


@pytest.fixture
def edited(make_service: MakeService, tmp_path: Path) -> Edited:
    """Edit a file, through the service, with a worker that leaves the pixels as they are."""
    service = make_service(FakeWorker(paint=canvas))

    async def edit(data: bytes, name: str = "in.png", to: str = "out.png", **more: bytes) -> Result:
        (tmp_path / name).write_bytes(data)
        asked = {"image_path": str(tmp_path / name), "output_path": str(tmp_path / to)}
        for argument, content in more.items():
            (tmp_path / argument).write_bytes(content)
            asked[argument] = str(tmp_path / argument)
        request = service.read_edit({**asked, "prompt": "x", "num_steps": 10, "overwrite": True})
        answer = (await edits_of(service).edit(request)).answer
        return Result(Path(answer.output_path), answer.metadata.to_dict())

    return edit


def saved(image: Image.Image | Pixels, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, name, **options)
    return buffer.getvalue()


# --- several pictures in one TIFF ---


def with_children(order: ByteOrder = "<", big: bool = False, **tags: Any) -> bytes:
    """A reduced copy first, and the full picture as its second child."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=order, bigtiff=big) as writer:
        kind = {"photometric": "rgb", "metadata": None}
        writer.write(255 - SCENE[::4, ::4], subfiletype=1, subifds=2, **kind, **tags)
        writer.write(255 - SCENE[::2, ::2], subfiletype=1, **kind)
        writer.write(SCENE, subfiletype=0, compression="zlib", **kind)
    return buffer.getvalue()


def pages(first_kind: int) -> bytes:
    """Two pages, the first of this kind: 0 is full, 1 is reduced."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        kind = {"photometric": "rgb", "metadata": None}
        writer.write(255 - SCENE[::4, ::4], subfiletype=first_kind, **kind)
        writer.write(SCENE, subfiletype=0, **kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [with_children(), with_children(">"), with_children(big=True), pages(1)],
    ids=["little", "big", "BigTIFF", "pages"],
)
async def test_the_full_picture_of_a_tiff_is_edited_and_not_its_reduced_copy(
    edited: Edited, data: bytes
) -> None:
    assert np.array_equal((await edited(data, "in.tif")).seen, SCENE)


async def test_a_larger_child_of_an_unmarked_first_picture_is_the_full_one(edited: Edited) -> None:
    kind = struct.pack("<HHI", 254, 4, 1)
    data = with_children().replace(kind + b"\1", kind + b"\0", 1)
    assert np.array_equal((await edited(data, "in.tif")).seen, SCENE)


async def test_of_several_full_pages_the_first_is_edited(edited: Edited) -> None:
    assert np.array_equal((await edited(pages(0), "in.tif")).seen, 255 - SCENE[::4, ::4])


async def test_credit_of_the_reduced_copy_counts_for_the_full_picture(edited: Edited) -> None:
    artist = (315, "s", 0, "Ada Lovelace", True)
    result = await edited(with_children(extratags=[artist]), "in.tif", "out.jpg")
    assert result.exif[ExifTags.Base.Artist] == "Ada Lovelace"


async def test_a_tiff_whose_directories_run_in_a_circle_is_read(edited: Edited) -> None:
    data = bytearray(pages(1))
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    (second,) = struct.unpack_from("<I", data, first + 2 + 12 * count)
    (count,) = struct.unpack_from("<H", data, second)
    struct.pack_into("<I", data, second + 2 + 12 * count, first)
    assert np.array_equal((await edited(bytes(data), "in.tif")).seen, SCENE)


@pytest.mark.parametrize("compression", [1, 8])
def test_strips_that_all_claim_the_whole_file_are_not_copied_as_often(compression: int) -> None:
    """Each row is a strip that is said to reach to the end of a file of 8 MB."""
    width, height, rest = 64, 1024, bytes(8_000_000)
    row = bytes(2 * width)
    strip = row if compression == 1 else zlib.compress(row)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16), (259, 3, 1, compression)]
    entries += [(262, 3, 1, 1)]
    offsets = 8 + 2 + 12 * 8 + 4
    start = offsets + 8 * height
    entries += [(273, 4, height, offsets), (278, 4, 1, 1), (279, 4, height, offsets + 4 * height)]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    data += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data += struct.pack("<I", start) * height + struct.pack("<I", len(rest)) * height
    data += strip + rest
    directory = opened(data).directory
    copied = 0

    class Counted(bytes):
        def __getitem__(self, key: Any) -> Any:
            nonlocal copied
            part = super().__getitem__(key)
            copied += len(part) if isinstance(part, bytes) else 1
            return part

    assert image_of(Counted(data), directory).getextrema() == (0, 0)
    assert copied < len(data)


async def test_a_tiff_whose_values_overlap_does_not_fill_the_memory(edited: Edited) -> None:
    """A file of 100 kB whose tags are said to hold 900 times as much."""
    entries = [struct.pack("<HHII", 40_000 + index, 7, 100_000, 8) for index in range(900)]
    sizes = [struct.pack("<HHII", tag, 3, 1, 16) for tag in (256, 257)]
    directory = struct.pack("<H", 902) + b"".join(sizes + entries) + bytes(4)
    data = struct.pack("<2sHI", b"II", 42, 8) + directory + bytes(100_000)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptImageError):
            await edited(data, "in.tif")
        assert read_record(data) is None
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


def test_samples_of_16_bits_are_unpacked_some_rows_at_a_time() -> None:
    """All of them at once, with one nobody needs, took thirty bytes for each pixel."""
    samples = np.full((2000, 3000, 5), 40_000, np.uint16)
    data = tiff(
        samples, photometric="rgb", extrasamples=[2, 0], compression="zlib", rowsperstrip=2000
    )
    tracemalloc.start()
    try:
        picture = decode(data, Limits(2**25, 50_000_000))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2000 * 3000
    finally:
        tracemalloc.stop()
    assert set(np.unique(picture.pixels)) == {156}


def raw(maker: str, **tags: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        make = (271, "s", 0, maker, True)
        extra = [make, *tags.pop("extratags", [])]
        kind: dict[str, Any] = {"metadata": None}
        writer.write(
            SCENE[::4, ::4], photometric="rgb", subfiletype=1, subifds=1, extratags=extra, **kind
        )
        writer.write(GREY_16, photometric=32803, subfiletype=0, **kind)
    return buffer.getvalue()


DNG = with_children(extratags=[(50706, "B", 4, (1, 4, 0, 0), True)])
CR2 = b"II*\0\x10\0\0\0CR\2\0" + bytes(100)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (raw("NIKON CORPORATION"), "Nikon NEF"),
        (raw("SONY"), "Sony ARW"),
        (raw("PENTAX"), "Pentax PEF"),
        (raw("Unheard of"), "sensor"),
        (DNG, "DNG"),
        (CR2, "Canon CR2"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "Canon CR3"),
        (b"FUJIFILMCCD-RAW 0201", "Fujifilm RAF"),
        (b"IIRO\x08\0\0\0", "Olympus ORF"),
        (b"IIU\0\x08\0\0\0", "Panasonic RW2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_camera_raw_is_refused_by_name_and_told_to_be_developed(
    edited: Edited, data: bytes, name: str
) -> None:
    with pytest.raises(
        UnsupportedImageError, match=f"^Unsupported image format: .*{name}.*develop"
    ):
        await edited(data, "in.tif")


# --- depths of TIFF ---


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 7},
        {"tile": (16, 32)},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True, "tile": (16, 32)},
    ],
    ids=["one strip", "strips", "tiles", "deflate", "predictor"],
)
async def test_planes_of_16_bits_are_read_as_a_picture(
    edited: Edited, order: ByteOrder, options: dict[str, Any]
) -> None:
    result = await edited(tiff_of_planes(SCENE_16, order, **options), "in.tif")
    assert np.array_equal(result.seen, SCENE)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
async def test_planes_of_16_bits_may_have_alpha(edited: Edited, kind: str) -> None:
    alpha = np.full(SCENE.shape[:2], 128 * 257, np.uint16)
    colours = (
        SCENE_16 if kind == "unassalpha" else (SCENE_16 * (128 / 255)).round().astype(np.uint16)
    )
    data = tiff_of_planes(np.dstack([colours, alpha]), extrasamples=[kind])
    result = await edited(data, "in.tif")
    assert result.mode == "RGBA"
    assert difference(result.seen, SCENE) < 1


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [6, 10, 12, 14, 16])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is 0", "black is 0"])
async def test_grey_of_any_depth_reaches_from_black_to_white(
    edited: Edited, order: ByteOrder, bits: int, photometric: int
) -> None:
    values = np.round(GREY / 255 * (2**bits - 1)).astype(int)
    stored = values if photometric else 2**bits - 1 - values
    result = await edited(packed_tiff(stored, bits, photometric, order), "in.tif")
    assert np.abs(result.seen.astype(int) - GREY_SEEN).max() <= (3 if bits < 8 else 1)


async def test_grey_of_16_bits_as_other_decoders_leave_it_has_its_full_range(
    edited: Edited,
) -> None:
    """Pillow decodes what is compressed in another way than by deflate."""
    image = Image.fromarray(GREY_16)
    for compression in ("tiff_lzw", "packbits"):
        result = await edited(saved(image, "TIFF", compression=compression), "in.tif")
        assert np.array_equal(result.seen, GREY_SEEN), compression


async def test_colours_of_12_bits_are_read(edited: Edited) -> None:
    values = np.round(SCENE / 255 * 4095).astype(int)
    assert difference((await edited(packed_tiff(values, 12, 2), "in.tif")).seen, SCENE) < 1


@pytest.mark.parametrize("order", "<>")
async def test_deflated_grey_of_16_bits_with_white_as_0_is_no_negative(
    edited: Edited, order: ByteOrder
) -> None:
    data = tiff(65535 - GREY_16, order, photometric="miniswhite", compression="zlib")
    assert np.array_equal((await edited(data, "in.tif")).seen, GREY_SEEN)


async def test_a_mask_of_16_bits_with_white_as_0_selects_what_is_white(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service()
    mask = np.zeros((64, 96), np.uint16)
    mask[:, 48:] = 65535
    (tmp_path / "in.png").write_bytes(saved(SCENE, "PNG"))
    (tmp_path / "mask.tif").write_bytes(tiff(65535 - mask, photometric="miniswhite"))
    request = service.read_edit(
        {
            "image_path": str(tmp_path / "in.png"),
            "mask_path": str(tmp_path / "mask.tif"),
            "prompt": "invert",
        }
    )

    result = seen(Path((await edits_of(service).edit(request)).answer.output_path))

    assert np.array_equal(result[:, :48], SCENE[:, :48])
    assert np.array_equal(result[:, 60:], 255 - SCENE[:, 60:])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (tiff(GREY.astype(np.float32)), "float TIFF"),
        (tiff(GREY.astype(np.uint32)), "TIFF with pixels of 32 bits"),
        (tiff(GREY_16.view(np.int16)), "TIFF with signed pixels"),
        (
            packed_tiff(GREY_16 >> 6, 10, 1).replace(
                struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 32773)
            ),
            "TIFF with 10-bit samples, 1 per pixel, and PackBits compression",
        ),
        (tiff(SCENE, ">", big=True, photometric="rgb"), "BigTIFF with its highest byte first"),
        (
            # What lies in it matters not: libtiff would complain on standard error.
            saved(SCENE, "TIFF").replace(
                struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 50001)
            ),
            "TIFF with WebP compression",
        ),
    ],
    ids=["float", "32 bits", "signed", "10 bits packed", "BigTIFF", "WebP"],
)
async def test_a_tiff_that_is_not_read_is_refused_by_what_it_is(
    edited: Edited, data: bytes, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedImageError, match=f"^Unsupported image format: {name}.*save it"):
        await edited(data, "in.tif")
    assert capfd.readouterr().err == ""


# --- profiles ---


def printed(*patches: tuple[int, int, int, int]) -> Image.Image:
    """Patches of ink, 32 pixels wide each, in percent of cyan, magenta, yellow and black."""
    image = Image.new("CMYK", (32 * len(patches), 32))
    for index, patch in enumerate(patches):
        inks = tuple(round(percent * 2.55) for percent in patch)
        image.paste(inks, (32 * index, 0, 32 * index + 32, 32))
    return image


def grey_with_compensation(lightness: float) -> float:
    """sRGB of a neutral tone, if the darkest tone of the press becomes black."""
    light, darkest = (
        ((tone + 16) / 116) ** 3 if tone > 8 else tone / 903.3
        for tone in (lightness, INKS_L["all inks"])
    )
    return float(encoded(np.array((light - darkest) / (1 - darkest)))) * 255


@pytest.mark.parametrize("padding", [0, 2 * 2**20], ids=["short", "2 MiB"])
@pytest.mark.parametrize("name", ["TIFF", "JPEG"])
async def test_ink_is_converted_by_its_profile_and_the_darkest_becomes_black(
    edited: Edited, name: str, padding: int
) -> None:
    patches = printed((0, 0, 0, 0), (0, 0, 0, 100), (100, 100, 100, 100))
    options = {"quality": 100} if name == "JPEG" else {}
    profile = cmyk_profile(padding)

    result = await edited(saved(patches, name, icc_profile=profile, **options), f"in.{name}")

    expected = [grey_with_compensation(INKS_L[tone]) for tone in ("paper", "black ink", "all inks")]
    assert result.seen[16, 16::32, 1].tolist() == pytest.approx(expected, abs=2)
    assert "icc_profile" not in result.info


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("to", ["out.png", "out.jpg", "out.tif"])
async def test_a_long_profile_is_used_even_if_the_result_cannot_hold_it(
    edited: Edited, name: str, to: str
) -> None:
    profile = swapped_profile(padding=3 * 2**19)
    options = {"quality": 95} if name in ("JPEG", "WEBP") else {}
    smooth = np.broadcast_to(SCENE[40:41], SCENE.shape)

    result = await edited(saved(smooth.copy(), name, icc_profile=profile, **options), "in.x", to)

    assert difference(result.seen, smooth[:, :, ::-1]) < LOSSY
    assert result.info.get("icc_profile") == (None if to == "out.png" else profile)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
async def test_grey_of_16_bits_is_converted_by_its_profile(edited: Edited, name: str) -> None:
    image = Image.fromarray(GREY_16)
    result = await edited(saved(image, name, icc_profile=grey_profile(1.0)), "in.x")
    assert difference(result.seen, levels(encoded(GREY_SEEN / 255.0))) < 1


# --- colour by numbers ---

P3 = levels(encoded(in_primaries(SCENE, DISPLAY_P3)))
HDR_WHITE = 203  # cd/m²
IN_PQ = levels(pq(in_primaries(SCENE, BT_2020) * HDR_WHITE))
IN_HLG = levels(hlg(in_primaries(SCENE, BT_2020) * HDR_WHITE))


def avif(pixels: Pixels, primaries: int, transfer: int) -> bytes:
    data = saved(pixels, "AVIF", quality=95, subsampling="4:4:4", speed=10)
    return with_nclx(data, primaries, transfer)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (png(P3, cicp(12, 13)), 1),
        (png(SCENE, cicp(1, 13), (b"gAMA", (100_000).to_bytes(4, "big"))), 0),
        (png((16 + SCENE / 255 * 219).round().astype(np.uint8), cicp(1, 13, False)), 1),
        (png(levels(linear(SCENE)), cicp(1, 8)), 1),
        (avif(P3, 12, 13), LOSSY),
        (avif(SCENE, 1, 1), LOSSY),
    ],
    ids=["P3", "sRGB", "narrow range", "linear", "AVIF P3", "AVIF BT.709"],
)
@pytest.mark.parametrize("to", ["out.png", "out.avif"])
async def test_colour_by_numbers_is_shown_as_it_is_meant(
    edited: Edited, data: bytes, tolerance: float, to: str
) -> None:
    result = await edited(data, "in.x", to)
    assert difference(result.seen, SCENE) <= tolerance + (LOSSY if to == "out.avif" else 0)
    assert result.warning is None


async def test_numbers_in_a_png_count_more_than_its_profile(edited: Edited) -> None:
    data = saved(SCENE, "PNG", icc_profile=swapped_profile())
    kind, body = cicp(1, 13)
    chunk = png(SCENE, (kind, body))[33 : 33 + 12 + len(body)]
    assert np.array_equal((await edited(data[:33] + chunk + data[33:])).seen, SCENE)


@pytest.mark.parametrize(
    ("data", "name", "tolerance"),
    [
        (png(IN_PQ, cicp(9, 16)), "PQ", 2),
        (png(IN_HLG, cicp(9, 18)), "HLG", 2),
        (avif(IN_PQ, 9, 16), "PQ", 6),
        (saved(IN_PQ, "PNG", icc_profile=rgb_profile(BT_2020, 2.4, codes=(9, 16))), "PQ", 2),
    ],
    ids=["PQ", "HLG", "AVIF PQ", "PQ by a profile"],
)
async def test_what_is_no_brighter_than_white_in_hdr_comes_out_as_in_sdr(
    edited: Edited, data: bytes, name: str, tolerance: float
) -> None:
    result = await edited(data, "in.x")
    assert difference(result.seen, SCENE) < tolerance
    assert result.seen[:12, :12].mean() > 250
    assert "icc_profile" not in result.info
    assert re.fullmatch(rf"the picture is HDR \({name}\).*tone-mapped.*BT\.2390", result.warning)


def shown_by_bt_2390(nits: float, peak: float) -> float:
    """The level of a grey, by ITU-R BT.2390, 5.4.1, for one value at a time."""
    source, target = float(pq(peak)), float(pq(HDR_WHITE))
    value, highest = float(pq(nits)) / source, target / source
    knee = 1.5 * highest - 0.5
    if value > knee:
        t = (value - knee) / (1 - knee)
        value = (
            (2 * t**3 - 3 * t**2 + 1) * knee
            + (t**3 - 2 * t**2 + t) * (1 - knee)
            + (3 * t**2 - 2 * t**3) * highest
        )
    steps = np.linspace(0, 10_000, 1_000_001)
    light = steps[np.searchsorted(pq(steps), value * source)] / HDR_WHITE
    return float(encoded(np.array(light))) * 255


async def test_highlights_of_hdr_are_compressed_by_the_named_operator(edited: Edited) -> None:
    nits = np.array([5.0, 50.0, 100.0, 203.0, 400.0, 1000.0])
    bars = np.repeat(np.repeat(levels(pq(nits)), 16)[None, :, None], 3, axis=2).repeat(32, axis=0)

    result = await edited(png(bars, cicp(9, 16)))

    expected = [shown_by_bt_2390(one, peak=1000) for one in nits]
    assert result.seen[16, 8::16, 1].tolist() == pytest.approx(expected, abs=3)


ULTRA_HDR = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0"/></rdf:RDF></x:xmpmeta>"""
APPLE = ULTRA_HDR.replace(b"hdrgm:Version", b"hdrgm:HDRGainMapVersion")


def with_second_picture(xmp: bytes = b"") -> bytes:
    """A JPEG with a small second picture behind it, as CIPA DC-007 stores several in one file."""
    second = [Image.fromarray(GREY[::4, ::4])]
    return saved(SCENE, "MPO", save_all=True, append_images=second, xmp=xmp, quality=95)


@pytest.mark.parametrize(
    ("data", "is_told"),
    [
        (with_second_picture(ULTRA_HDR), True),
        (with_second_picture(APPLE), True),
        (
            with_second_picture().replace(
                b"\xff\xdb",
                b"\xff\xe2\0\x22urn:iso:std:iso:ts:21496:-1\0\0\0\0\0\xff\xdb",
                1,
            ),
            True,
        ),
        (
            saved(SCENE, "AVIF", quality=95, speed=10)
            + b"\0\0\0\x32free"
            + b"urn:com:apple:photo:2020:aux:hdrgainmap\0\0\0",
            True,
        ),
        (with_second_picture(), False),
        (saved(SCENE, "JPEG", quality=95), False),
    ],
    ids=[
        "Ultra HDR",
        "Apple",
        "ISO 21496-1",
        "an auxiliary picture",
        "a second picture only",
        "plain",
    ],
)
async def test_a_gain_map_is_dropped_and_the_answer_says_so(
    edited: Edited, data: bytes, is_told: bool
) -> None:
    result = await edited(data, "in.x")
    assert difference(result.seen, SCENE) < LOSSY
    told = "the picture's gain map for HDR was dropped; the result is SDR"
    assert result.warning == (told if is_told else None)


async def test_colours_by_numbers_that_mean_nothing_here_are_refused(edited: Edited) -> None:
    with pytest.raises(
        UnsupportedImageError, match=r"codes 1 and 9 of ITU-T H\.273; save it as sR"
    ):
        await edited(png(SCENE, cicp(1, 9)))


GAMMA_2_2 = (b"gAMA", (45_455).to_bytes(4, "big"))


def chromaticities(*values: float) -> tuple[bytes, bytes]:
    return b"cHRM", b"".join(round(one * 100_000).to_bytes(4, "big") for one in values)


@pytest.mark.parametrize(
    "data",
    [
        png(levels(linear(SCENE)), (b"gAMA", (100_000).to_bytes(4, "big"))),
        png(levels(linear(SCENE) ** (1 / 1.8)), (b"gAMA", (55_556).to_bytes(4, "big"))),
        png(SCENE, GAMMA_2_2),
        png(SCENE, GAMMA_2_2, chromaticities(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)),
        png(P3, GAMMA_2_2, chromaticities(0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)),
        png(SCENE, (b"sRGB", b"\0"), (b"gAMA", (100_000).to_bytes(4, "big"))),
        png(SCENE, (b"gAMA", bytes(4))),
    ],
    ids=["1.0", "1.8", "2.2", "sRGB", "P3", "sRGB chunk", "0"],
)
async def test_the_gamma_of_a_png_without_a_profile_counts(edited: Edited, data: bytes) -> None:
    assert difference((await edited(data)).seen, SCENE) < 1


@pytest.mark.parametrize("to", ["out.png", "out.jpg", "out.webp", "out.tif", "out.bmp"])
async def test_a_camera_that_marks_adobe_rgb_is_believed(edited: Edited, to: str) -> None:
    pixels = levels(in_primaries(SCENE, ADOBE_RGB) ** (256 / 563))
    smooth = pixels[20:, :]  # one line of JPEG blocks below the hard edges
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    tags[ExifTags.Base.ColorSpace] = 0xFFFF
    tags[ExifTags.IFD.Interop] = {ExifTags.Interop.InteropIndex: "R03"}
    data = saved(smooth, "JPEG", quality=98, subsampling=0, exif=exif)

    result = await edited(data, "in.jpg", to)

    assert difference(result.seen, SCENE[20:, :]) < LOSSY
    assert ("icc_profile" in result.info) == (to != "out.bmp")


# --- density and credit ---

FORMATS = [".png", ".jpg", ".webp", ".avif", ".tif"]


def density_of(result: Result) -> tuple[float, float]:
    """Pixels per inch, from where each format has them."""
    if "dpi" in result.info:
        across, down = result.info["dpi"]
        return float(across), float(down)
    assert result.exif[ExifTags.Base.ResolutionUnit] == 2
    return float(result.exif[ExifTags.Base.XResolution]), float(
        result.exif[ExifTags.Base.YResolution]
    )


def in_exif(**tags: Any) -> Image.Exif:
    exif = Image.Exif()
    exif.update({getattr(ExifTags.Base, name): value for name, value in tags.items()})
    return exif


LYING = {"Orientation": 6, "XResolution": 600.0, "YResolution": 300.0, "ResolutionUnit": 2}


@pytest.mark.parametrize(
    ("data", "density"),
    [
        (saved(SCENE, "PNG", dpi=(300, 150)), (300, 150)),
        (saved(SCENE, "JPEG", dpi=(300, 150)), (300, 150)),
        (saved(SCENE, "PNG", exif=in_exif(XResolution=300.0, YResolution=150.0)), (300, 150)),
        (saved(SCENE, "PNG", dpi=(72, 72)), (72, 72)),
        (saved(SCENE, "BMP", dpi=(300, 150)), (300, 150)),
        (saved(SCENE, "TIFF", dpi=(300, 150)), (300, 150)),
        (saved(SCENE, "TIFF", resolution_unit=3, x_resolution=100, y_resolution=200), (254, 508)),
        (tiff(SCENE_16, photometric="rgb", resolution=(600, 600), resolutionunit=2), (600, 600)),
        (saved(SCENE, "WEBP", exif=in_exif(**LYING)), (300, 600)),
        (saved(SCENE, "TIFF", exif=in_exif(**LYING)), (300, 600)),
    ],
    ids=[
        "PNG",
        "JPEG",
        "PNG EXIF",
        "PNG 72",
        "BMP",
        "TIFF",
        "cm",
        "16 bits",
        "WebP lying",
        "TIFF lying",
    ],
)
async def test_the_density_of_a_picture_is_kept_in_every_format(
    edited: Edited, data: bytes, density: tuple[float, float]
) -> None:
    for suffix in [*FORMATS, ".bmp"]:
        result = await edited(data, "in.x", f"out{suffix}")
        assert density_of(result) == pytest.approx(density, abs=0.03), suffix


async def test_a_density_that_no_file_gives_is_not_made_up(edited: Edited) -> None:
    data = saved(SCENE, "JPEG", exif=in_exif(Make="Leica"))
    for suffix in FORMATS:
        result = await edited(data, "in.x", f"out{suffix}")
        # EXIF wants this for "unknown"; no other part of the file says any.
        assert result.exif[ExifTags.Base.XResolution] == 72, suffix
        assert result.exif[ExifTags.Base.YResolution] == 72, suffix
        assert result.exif[ExifTags.Base.ResolutionUnit] == 2, suffix
        assert result.info.get("jfif_unit", 0) == 0, suffix
        again = await edited(result.path.read_bytes(), f"in{suffix}", "again.png")
        assert "dpi" not in again.info, suffix


@pytest.mark.parametrize("data", [saved(SCENE, "PNG"), saved(SCENE, "JPEG", dpi=(300, 150))])
@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
async def test_exiftool_finds_nothing_wrong_with_a_result(edited: Edited, data: bytes) -> None:
    for suffix in FORMATS:
        result = await edited(data, "in.x", f"out{suffix}")
        command = ["exiftool", "-validate", "-warning", "-a", str(result.path)]
        told = await asyncio.to_thread(subprocess.check_output, command, text=True)
        assert "Warning" not in told, (suffix, told)
        command = ["exiftool", "-s3", "-XMP-iptcExt:DigitalSourceType", str(result.path)]
        told = await asyncio.to_thread(subprocess.check_output, command, text=True)
        assert told.strip() == f"{SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia", suffix


XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"> <rdf:Description rdf:about=""
xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmpRights="http://ns.adobe.com/xap/1.0/rights/"
 xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:aux="http://ns.adobe.com/exif/1.0/aux/"
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 photoshop:Credit="Reuters &amp; Söhne" exif:GPSLatitude="47,22.0N" aux:SerialNumber="31415926"
 tiff:Orientation="6">
<dc:creator><rdf:Seq><rdf:li>Grace Hopper</rdf:li><rdf:li>李小龍</rdf:li></rdf:Seq></dc:creator>
<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">© 2024 &lt;all&gt; rights</rdf:li></rdf:Alt>
</dc:rights>
<xmpRights:UsageTerms><rdf:Alt><rdf:li xml:lang="x-default">Only with credit</rdf:li></rdf:Alt>
</xmpRights:UsageTerms></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>""".encode()

TIFF_WITH_XMP = saved(SCENE, "TIFF", tiffinfo={700: XMP})


CREDIT = ("dc:creator", "dc:rights", "xmpRights:UsageTerms", "photoshop:Credit")
MARK = ("Iptc4xmpExt:DigitalSourceType", "Iptc4xmpExt:AISystemUsed", "xmp:CreatorTool")


def texts_of(packet: bytes | str, names: tuple[str, ...] = CREDIT) -> dict[str, list[str]]:
    """The texts of an XMP packet, by the names of their properties: a reader of plain words."""
    text = packet if isinstance(packet, str) else packet.decode()
    found = {}
    for name in names:
        whole = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        if whole is not None:
            found[name] = re.findall(r">([^<>]+)<", f">{whole[1]}<")
    return found


@pytest.mark.parametrize(
    "data",
    [
        saved(SCENE, "JPEG", xmp=XMP),
        saved(SCENE, "WEBP", xmp=XMP),
        saved(SCENE, "AVIF", xmp=XMP, speed=10),
        TIFF_WITH_XMP,
    ],
    ids=["JPEG", "WebP", "AVIF", "TIFF"],
)
async def test_who_made_a_picture_and_its_terms_stay_with_it_and_nothing_else_of_xmp(
    edited: Edited, data: bytes
) -> None:
    for suffix in FORMATS:
        result = await edited(data, "in.x", f"out{suffix}")
        assert texts_of(result.info["xmp"]) == {
            "dc:creator": ["Grace Hopper", "李小龍"],
            "dc:rights": ["© 2024 &lt;all&gt; rights"],
            "xmpRights:UsageTerms": ["Only with credit"],
            "photoshop:Credit": ["Reuters &amp; Söhne"],
        }, suffix
        written = result.path.read_bytes()
        assert b"GPS" not in written
        assert b"31415926" not in written


SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def with_source_type(name: str) -> bytes:
    """XMP of another program, which uses its own prefix and an attribute."""
    extension = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    attribute = f'xmlns:ext="{extension}" ext:DigitalSourceType="{SOURCE_TYPES}{name}" rdf:about='
    return XMP.replace(b"rdf:about=", attribute.encode())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("digitalCapture", "compositeWithTrainedAlgorithmicMedia"),
        ("compositeWithTrainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"),
        ("trainedAlgorithmicMedia", "trainedAlgorithmicMedia"),
    ],
)
async def test_every_result_says_in_the_words_of_the_iptc_that_a_model_made_it(
    edited: Edited, before: str, after: str
) -> None:
    data = saved(SCENE, "JPEG", xmp=with_source_type(before))
    for suffix in FORMATS:
        result = await edited(data, "in.jpg", f"out{suffix}")
        assert texts_of(result.info["xmp"], MARK) == {
            "Iptc4xmpExt:DigitalSourceType": [f"{SOURCE_TYPES}{after}"],
            "Iptc4xmpExt:AISystemUsed": ["fake"],
            "xmp:CreatorTool": ["step1x-edit"],
        }, suffix
        software = result.info.get("Software") or result.exif[ExifTags.Base.Software]
        assert software == "step1x-edit", suffix


async def test_what_xmp_says_about_another_picture_is_not_said_of_the_result(
    edited: Edited,
) -> None:
    """A description inside of a property is about an ingredient."""
    extension = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    inner = (
        f'<i:Ingredient xmlns:i="urn:i" xmlns:ext="{extension}"><rdf:Description '
        f'ext:DigitalSourceType="{SOURCE_TYPES}trainedAlgorithmicMedia">'
        "<dc:creator><rdf:Seq><rdf:li>Another</rdf:li></rdf:Seq></dc:creator>"
        "</rdf:Description></i:Ingredient>"
    )
    packet = XMP.replace(b"<dc:creator>", inner.encode() + b"<dc:creator>")

    result = await edited(saved(SCENE, "JPEG", xmp=packet), "in.jpg", "out.png")

    found = texts_of(result.info["xmp"], (*MARK, *CREDIT))
    assert found["dc:creator"] == ["Grace Hopper", "李小龍"]
    assert found["Iptc4xmpExt:DigitalSourceType"] == [
        f"{SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia"
    ]


def test_nested_xmp_does_not_multiply_its_texts() -> None:
    """1 MiB of it, a few kilobytes in a PNG, would have filled the memory."""
    depth, texts = 100, 1000
    packet = XMP.replace(
        b"<dc:creator>",
        b"<rdf:Description><dc:x>" * depth
        + b"<rdf:li>x</rdf:li>" * texts
        + b"</dc:x></rdf:Description>" * depth
        + b"<dc:creator>",
    )
    assert sum(map(len, provenance.texts_of(packet).values())) < 2 * texts


async def test_credit_keeps_spaces_that_do_not_break_and_joined_letters(edited: Edited) -> None:
    name = "© 2026\u00a0علی\u200cرضا 👩\u200d🎨"
    packet = XMP.replace(b"Grace Hopper", name.encode())
    result = await edited(saved(SCENE, "JPEG", xmp=packet), "in.jpg", "out.png")
    assert texts_of(result.info["xmp"])["dc:creator"][0] == name


async def test_the_mark_fits_beside_the_longest_credit(edited: Edited) -> None:
    credit = [(name, "&amp;" * 2000) for name in ("photoshop:Credit", "xmpRights:WebStatement")]
    texts = "".join(f"<{name}>{text}</{name}>" for name, text in credit)
    for name in ("dc:rights", "xmpRights:UsageTerms"):
        texts += f"<{name}><rdf:Alt><rdf:li>{'&amp;' * 2000}</rdf:li></rdf:Alt></{name}>"
    creators = f"<rdf:li>{'&amp;' * 200}</rdf:li>" * 20
    texts += f"<dc:creator><rdf:Seq>{creators}</rdf:Seq></dc:creator>"
    head, _, tail = XMP.partition(b"<dc:creator>")
    packet = head + texts.encode() + tail[tail.index(b"</rdf:Description>") :]

    result = await edited(saved(SCENE, "WEBP", xmp=packet), "in.webp", "out.jpg")

    assert len(texts_of(result.info["xmp"])["dc:creator"]) == 20
    assert texts_of(result.info["xmp"], MARK)["xmp:CreatorTool"] == ["step1x-edit"]


async def test_an_orientation_that_only_xmp_has_does_not_turn_a_picture(edited: Edited) -> None:
    for data in (saved(SCENE, "JPEG", xmp=XMP), TIFF_WITH_XMP):
        assert (await edited(data, "in.x")).seen.shape == SCENE.shape


def iptc(**texts: bytes) -> bytes:
    numbers = {"by_line": 80, "copyright": 116, "credit": 110, "city": 90}
    return b"".join(
        bytes([0x1C, 2, numbers[name]]) + len(text).to_bytes(2, "big") + text
        for name, text in texts.items()
    )


IPTC = iptc(
    by_line="Ada Müller".encode("latin-1"), copyright=b"(c) Ada", credit=b"dpa", city=b"Bern"
)


def jpeg_with_iptc() -> bytes:
    padded = IPTC + bytes(len(IPTC) % 2)
    block = b"8BIM\x04\x04\0\0" + len(IPTC).to_bytes(4, "big") + padded
    content = b"Photoshop 3.0\0" + block
    data = saved(SCENE, "JPEG")
    return data[:2] + b"\xff\xed" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def tiff_with_iptc(kind: int) -> bytes:
    """Some programs say that the bytes are numbers of 32 bits, and fill up the last of them."""
    padded = IPTC + bytes(-len(IPTC) % 4)
    value = np.frombuffer(padded, "<u4") if kind == 4 else padded
    return tiff(SCENE, photometric="rgb", extratags=[(33723, kind, len(value), value, True)])


@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize(
    "data", [jpeg_with_iptc(), tiff_with_iptc(7), tiff_with_iptc(4)], ids=["JPEG", "bytes", "longs"]
)
async def test_credit_of_iptc_becomes_that_of_xmp(edited: Edited, data: bytes) -> None:
    result = await edited(data, "in.x", "out.jpg")
    assert texts_of(result.info["xmp"]) == {
        "dc:creator": ["Ada Müller"],
        "dc:rights": ["(c) Ada"],
        "photoshop:Credit": ["dpa"],
    }
    assert b"Bern" not in result.path.read_bytes()


@pytest.mark.parametrize(
    "packet",
    [
        b"<x:xmpmeta",
        b"\xff\xfe\0",
        b'<!DOCTYPE x [<!ENTITY a "secret">]>' + XMP.replace(b"Grace Hopper", b"&a;"),
        XMP.replace(b"Grace Hopper", b"secret" * 100),
    ],
    ids=["cut", "no text", "entities", "long"],
)
async def test_xmp_that_cannot_be_trusted_harms_nothing(edited: Edited, packet: bytes) -> None:
    result = await edited(saved(SCENE, "JPEG", xmp=packet), "in.jpg", "out.png")
    assert difference(result.seen, SCENE) < LOSSY
    assert b"secret" not in result.path.read_bytes()


async def test_the_comment_of_exif_has_the_type_and_the_order_of_bytes_that_exif_wants(
    edited: Edited,
) -> None:
    for suffix in (".jpg", ".webp", ".avif", ".tif"):
        result = await edited(saved(SCENE, "PNG"), "in.png", f"out{suffix}")
        data = result.path.read_bytes()
        # The directory entry: tag 0x9286, type 7 (UNDEFINED).
        little, big = b"\x86\x92\x07\x00", b"\x92\x86\x00\x07"
        assert (little in data, big in data) == (suffix == ".tif", suffix != ".tif"), suffix
        codec = "utf-16-le" if suffix == ".tif" else "utf-16-be"
        assert b"UNICODE\0" + '{"software"'.encode(codec) in data, suffix
        assert result.exif[ExifTags.Base.ExifVersion] == b"0232", suffix


# --- what stays of colour and alpha ---


async def test_an_animation_whose_first_picture_hides_nothing_gives_an_opaque_result(
    edited: Edited,
) -> None:
    first, second = (Image.fromarray(one).convert("RGBA") for one in (SCENE, 255 - SCENE))
    second.putalpha(100)
    animated = saved(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    result = await edited(animated, "in.webp", "out.png")
    assert result.mode == "RGB"
    assert np.array_equal(result.seen, SCENE)


async def test_thin_lines_of_colour_survive_avif(edited: Edited) -> None:
    lines = np.zeros((64, 96, 3), np.uint8)
    lines[:, ::2], lines[:, 1::2] = (255, 0, 0), (0, 0, 255)
    result = await edited(saved(lines, "PNG"), "in.png", "out.avif")
    assert difference(result.seen, lines) < LOSSY


async def test_a_shade_of_16_bits_that_is_transparent_stays_so(edited: Edited) -> None:
    values = GREY_16.copy()
    values[20:30, 20:30] = 0x1234
    result = await edited(saved(Image.fromarray(values), "PNG", transparency=0x1234))
    with Image.open(result.path) as image:
        alpha = np.array(image.convert("RGBA").getchannel("A"))
    assert (alpha[20:30, 20:30] == 0).all()
    assert (alpha == 0).sum() == 100


# --- HEIC, and what is refused ---


def heic(**options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(SCENE)).save(buffer, quality=95, **options)
    return buffer.getvalue()


async def test_heic_is_read_if_its_decoder_is_installed(edited: Edited) -> None:
    result = await edited(heic(), "in.heic", "out.png")
    assert difference(result.seen, SCENE) < LOSSY


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
async def test_a_truncated_heic_is_not_called_unsupported(edited: Edited, share: float) -> None:
    data = heic()
    with pytest.raises(CorruptImageError):
        await edited(data[: int(len(data) * share)], "in.heic")


async def test_heic_is_named_if_its_decoder_is_not_installed(
    edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as Python notes what cannot be imported
    with pytest.raises(UnsupportedImageError, match=r"^Unsupported image format: HEIC; .*heic\]"):
        await edited(heic(), "in.heic")


JPEG_HEADER = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0", "JPEG XL"),
        (saved(SCENE, "JPEG2000"), "JPEG 2000"),
        (JPEG_HEADER + b"\xff\xc1\0\x11\x0c\0\x40\0\x40\3\1\x11\0\2\x11\0\3\x11\0", "12-bit JPEG"),
        (JPEG_HEADER + b"\xff\xf7\0\x0b\x08\0\x40\0\x40\1\1\x11\0", "JPEG-LS"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\n", "Radiance HDR"),
        (b"8BPS\0\1", "Photoshop"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.4", "PDF"),
        (saved(SCENE, "PPM"), "Netpbm"),
        (saved(SCENE, "TGA")[:-26] + bytes(8) + b"TRUEVISION-XFILE.\0", "TGA"),
        (saved(SCENE, "ICO"), "ICO"),
        (saved(SCENE, "DDS"), "DDS"),
        (b"\0\0\0\x18ftypisom\0\0\0\1isommp41", "video"),
        (b"<!DOCTYPE html><html><body>Not found", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_format_that_is_not_read_is_refused_by_name(
    edited: Edited, data: bytes, name: str
) -> None:
    with pytest.raises(UnsupportedImageError, match=f"^Unsupported image format: .*{name}"):
        await edited(data, "in.png")


# --- a JPEG that lacks its end ---


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("progressive", [False, True])
async def test_a_jpeg_that_lacks_only_its_end_marker_is_read_with_a_warning(
    edited: Edited, missing: int, progressive: bool
) -> None:
    whole = saved(SCENE, "JPEG", quality=95, progressive=progressive)
    result = await edited(whole[:-missing], "in.jpg")
    assert np.array_equal(result.seen, np.array(Image.open(io.BytesIO(whole))))
    assert result.warning == "the JPEG lacks its end marker; its picture is complete"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
async def test_a_jpeg_that_lacks_more_is_refused(
    edited: Edited, share: float, progressive: bool
) -> None:
    whole = saved(SCENE, "JPEG", quality=95, progressive=progressive)
    with pytest.raises(CorruptImageError):
        await edited(whole[: int(len(whole) * share)], "in.jpg")


async def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused(edited: Edited) -> None:
    whole = saved(SCENE, "JPEG", quality=95, progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xc4|\xff\xda", whole)]
    for end in scans[-4:]:
        with pytest.raises(CorruptImageError):
            await edited(whole[:end], "in.jpg")
