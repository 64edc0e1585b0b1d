"""The format of a file and its colour description, read from its container without a decoder.

It names unsupported formats, so that an error says what was found, and parses what Pillow does not
expose: coded colours in PNG and AVIF, gain maps, and whether a JPEG lacks only its end marker.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

from step1x_edit.pictures.colour import Cicp

# --- names ---------------------------------------------------------------------------------------

CAMERA_RAW: Final = "a camera raw; develop it in a raw converter and save it as TIFF or JPEG"
"""Follows the name of such a format in an error message."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_SAVE: Final = "save it as PNG, JPEG or TIFF"
_NO_PICTURE: Final = "give a picture: PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF"

_BEGINNINGS: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", _SAVE),
    (b"\xff\x0a", "JPEG XL", _SAVE),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", _SAVE),
    (b"\xff\x4f\xff\x51", "JPEG 2000", _SAVE),
    (b"II\xbc", "JPEG XR", _SAVE),
    (b"v/1\x01", "OpenEXR", "tone-map it and save it as PNG or TIFF with 8 or 16 bits"),
    (b"#?RADIANCE", "Radiance HDR", "tone-map it and save it as PNG or TIFF with 8 or 16 bits"),
    (b"#?RGBE", "Radiance HDR", "tone-map it and save it as PNG or TIFF with 8 or 16 bits"),
    (b"8BPS", "Photoshop document (PSD)", _SAVE),
    (b"gimp xcf", "GIMP document (XCF)", _SAVE),
    (b"FUJIFILMCCD-RAW", "Fujifilm RAF", CAMERA_RAW),
    (b"IIU\0", "Panasonic RW2", CAMERA_RAW),
    (b"IIRO", "Olympus ORF", CAMERA_RAW),
    (b"IIRS", "Olympus ORF", CAMERA_RAW),
    (b"MMOR", "Olympus ORF", CAMERA_RAW),
    (b"\0MRM", "Minolta MRW", CAMERA_RAW),
    (b"FOVb", "Sigma X3F", CAMERA_RAW),
    (b"II\x1a\0\0\0HEAPCCDR", "Canon CRW", CAMERA_RAW),
    (b"DDS ", "DirectDraw surface (DDS)", _SAVE),
    (b"qoif", "QOI", _SAVE),
    (b"BPG\xfb", "BPG", _SAVE),
    (b"FLIF", "FLIF", _SAVE),
    (b"\x8aMNG", "MNG", _SAVE),
    (b"\0\0\x01\0", "Windows icon (ICO)", _SAVE),
    (b"\0\0\x02\0\0\0\0\0", "TGA", _SAVE),
    (b"\0\0\x0a\0\0\0\0\0", "TGA", _SAVE),
    (b"icns", "macOS icon (ICNS)", _SAVE),
    (b"SIMPLE  =", "FITS", "save it as PNG or TIFF with 8 or 16 bits"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile (WMF)", _SAVE),
    (b"%PDF", "PDF", "save its page as PNG or JPEG"),
    (b"%!PS", "PostScript", "save its page as PNG or JPEG"),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)", "save its page as PNG or JPEG"),
    (b"\x1aE\xdf\xa3", "video (Matroska or WebM)", "save a frame of it as PNG or JPEG"),
    (b"PK\x03\x04", "ZIP archive", _NO_PICTURE),
    (b"\x1f\x8b", "gzip archive", _NO_PICTURE),
    (b"version https://git-lfs", "pointer of Git LFS", "run git lfs pull"),
)
_HEIC_ADVICE: Final = (
    "save it as JPEG, or have the operator install pillow-heif (the extra step1x-edit[heic])"
)
_BRANDS: Final = {
    b"heic": ("HEIC", _HEIC_ADVICE),
    b"heix": ("HEIC", _HEIC_ADVICE),
    b"heim": ("HEIC", _HEIC_ADVICE),
    b"heis": ("HEIC", _HEIC_ADVICE),
    b"hevc": ("HEIC", _HEIC_ADVICE),
    b"hevx": ("HEIC", _HEIC_ADVICE),
    b"avif": ("AVIF that is damaged or incomplete", "save it again"),
    b"avis": ("AVIF that is damaged or incomplete", "save it again"),
    b"crx ": ("Canon CR3", CAMERA_RAW),
    b"mif1": ("HEIF", _SAVE),
    b"msf1": ("HEIF", _SAVE),
    b"qt  ": ("video (QuickTime)", "save a frame of it as PNG or JPEG"),
    b"isom": ("video (MP4)", "save a frame of it as PNG or JPEG"),
    b"mp41": ("video (MP4)", "save a frame of it as PNG or JPEG"),
    b"mp42": ("video (MP4)", "save a frame of it as PNG or JPEG"),
}
_MARKUP: Final = (
    (re.compile(rb"<svg[\s>]", re.IGNORECASE), "SVG", "save it as PNG"),
    (re.compile(rb"<(!doctype )?html", re.IGNORECASE), "HTML page", _NO_PICTURE),
)
_NETPBM: Final = re.compile(rb"P[1-7Ff]\s")


def is_heic(data: bytes) -> bool:
    """Whether the file is HEIC, the picture format of phones."""
    return any(_BRANDS.get(brand, ("",))[0] == "HEIC" for brand in _brands(data))


def name_of(data: bytes) -> str | None:
    """The format of a file that no decoder reads, and what to do; None if that is unknown."""
    found = _recognised(data)
    return None if found is None else "; ".join(found)


def _recognised(data: bytes) -> tuple[str, str] | None:
    brands = _brands(data)
    for brand, found in _BRANDS.items():
        if brand in brands:
            return found
    for beginning, name, advice in _BEGINNINGS:
        if data.startswith(beginning):
            return name, advice
    if data.startswith(_SOI):
        return _recognised_jpeg(data)
    if _NETPBM.match(data):
        return "Netpbm (PPM, PGM, PBM or PFM)", _SAVE
    if data[128:132] == b"DICM":
        return "DICOM", "save it as PNG or TIFF with 8 or 16 bits"
    if data[-18:-2] == b"TRUEVISION-XFILE":
        return "TGA", _SAVE
    for like, name, advice in _MARKUP:
        if like.search(data[:1024]):
            return name, advice
    return None


# --- boxes of ISO files (HEIF, AVIF) -------------------------------------------------------------

_Span = tuple[int, int]
_MAX_BOXES: Final = 10_000


def _brands(data: bytes) -> tuple[bytes, ...]:
    """The brands that a file declares, the major one first."""
    if data[4:8] != b"ftyp":
        return ()
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    return (data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4)))


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, _Span]]:
    """Each box between two positions: its kind and the range of its content."""
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            size, head = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:
            size = end - start
        if size < head or start + size > end:
            return
        yield kind, (start + head, start + size)
        start += size


def box(data: bytes, within: _Span, *path: bytes) -> _Span | None:
    """The content of the first box at a path of kinds."""
    for kind in path:
        found = next((span for name, span in _boxes(data, *within) if name == kind), None)
        if found is None:
            return None
        within = (found[0] + 4, found[1]) if kind == b"meta" else found
    return within


def _iso_numbers(data: bytes) -> Cicp | None:
    """The nclx colour of the main picture, from its colr box."""
    everything = 0, len(data)
    main = box(data, everything, b"meta", b"pitm")
    store = box(data, everything, b"meta", b"iprp", b"ipco")
    links = box(data, everything, b"meta", b"iprp", b"ipma")
    if main is None or store is None or links is None:
        return None
    item = int.from_bytes(data[main[0] + 4 : main[1]], "big")
    properties = list(_boxes(data, *store))
    for index in _properties_of(data, links, item):
        if not 0 < index <= len(properties):
            continue
        kind, (start, end) = properties[index - 1]
        if kind == b"colr" and data[start : start + 4] == b"nclx" and end - start >= 11:
            primaries, transfer = struct.unpack_from(">HH", data, start + 4)
            return Cicp(primaries, transfer)  # the decoder has expanded a limited range
    return None


def _properties_of(data: bytes, links: _Span, wanted: int) -> list[int]:
    """The numbers, from 1, of the properties that an ipma box assigns to a picture."""
    at, end = links
    version, is_wide = data[at], bool(data[at + 3] & 1)
    id_bytes, index_bytes = (4 if version else 2), (2 if is_wide else 1)
    (entries,) = struct.unpack_from(">I", data, at + 4)
    at += 8
    for _ in range(entries):
        if at + id_bytes + 1 > end:
            return []
        item = int.from_bytes(data[at : at + id_bytes], "big")
        count = data[at + id_bytes]
        at += id_bytes + 1
        if item == wanted:
            mask = (1 << (8 * index_bytes - 1)) - 1  # without the bit for "essential"
            return [
                int.from_bytes(data[place : place + index_bytes], "big") & mask
                for place in range(at, min(at + count * index_bytes, end), index_bytes)
            ]
        at += count * index_bytes
    return []


# --- chunks of PNG -------------------------------------------------------------------------------


def _png_numbers(data: bytes) -> Cicp | None:
    """The cICP chunk, which precedes the pixels; one with a matrix other than RGB is invalid."""
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            return None
        if kind == b"cICP" and length == 4:
            primaries, transfer, matrix, is_full = data[at + 8 : at + 12]
            if matrix != 0:
                return None
            return Cicp(primaries, transfer, bool(is_full), outrank_profile=True)
        at += 12 + length
    return None


def is_png(data: bytes) -> bool:
    """Whether the bytes start like a PNG."""
    return data.startswith(_PNG_SIGNATURE)


def colour_numbers(data: bytes) -> Cicp | None:
    """The colour codes of a PNG, AVIF or HEIC; None if it has none."""
    return _png_numbers(data) if is_png(data) else _iso_numbers(data) if _brands(data) else None


# --- gain maps -----------------------------------------------------------------------------------

_OF_GAIN_MAPS: Final = (
    b"hdrgm:Version",  # XMP of Ultra HDR
    b"urn:iso:std:iso:ts:21496:-1",  # JPEG with the metadata of ISO 21496-1
    b"HDRGainMapVersion",  # XMP of phones by Apple
    b"urn:com:apple:photo:2020:aux:hdrgainmap",  # the type of such a picture in HEIC
)


def has_gain_map(data: bytes) -> bool:
    """Whether a JPEG, AVIF or HEIC contains a second picture that makes an HDR picture of it."""
    brands = _brands(data)
    if not brands and not data.startswith(_SOI):
        return False
    return b"tmap" in brands or any(mark in data for mark in _OF_GAIN_MAPS)


# --- segments of JPEG ----------------------------------------------------------------------------

_SOI: Final = b"\xff\xd8"
_EOI: Final = b"\xff\xd9"
_SOF_LOSSLESS_LS: Final = 0xF7
_FRAMES: Final = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {_SOF_LOSSLESS_LS}
_SOS: Final = 0xDA
_MARKER: Final = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # followed by a length, or EOI
_MAX_SEGMENTS: Final = 10_000


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker and the content of each segment; compressed data in between is skipped."""
    at = len(_SOI)
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[0] == _EOI:
            return
        at = found.end()
        end = at + int.from_bytes(data[at : at + 2], "big")
        yield found[0][1], data[at + 2 : end]
        at = end


def _recognised_jpeg(data: bytes) -> tuple[str, str] | None:
    for marker, content in _segments(data):
        if marker == _SOF_LOSSLESS_LS:
            return "JPEG-LS", _SAVE
        if marker in _FRAMES and content and content[0] != 8:
            return f"{content[0]}-bit JPEG", "save it with 8 bits"
    return None


def with_end_marker(data: bytes) -> bytes | None:
    """A JPEG with all scans of its picture, with the missing end marker added; or None.

    Only a decoder can tell whether its last scan is complete: see `has_all_scans`.
    """
    if not data.startswith(_SOI) or data.rstrip(b"\0").endswith(_EOI):
        return None
    return data.removesuffix(b"\xff") + _EOI if has_all_scans(data) else None


def has_all_scans(data: bytes) -> bool:
    """Whether each coefficient of each component is in a scan, down to its last bit."""
    wanted = {(-1, -1)}
    for marker, content in _segments(data):
        if marker in _FRAMES and len(content) >= 6:
            components = content[6 : 6 + 3 * content[5] : 3]
            wanted = {(component, index) for component in components for index in range(64)}
        if marker == _SOS and content and len(content) >= 4 + 2 * content[0]:
            components = content[1 : 1 + 2 * content[0] : 2]
            first, last, bits = content[1 + 2 * content[0] :][:3]
            if bits & 15 == 0:
                wanted -= {(one, index) for one in components for index in range(first, last + 1)}
    return not wanted
