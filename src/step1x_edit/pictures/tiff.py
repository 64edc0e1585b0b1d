"""TIFF files: which directory has the full picture, and samples that Pillow cannot read.

A TIFF is a chain of directories, and each may have children (SubIFDs). Many programs put a reduced
copy first, and most camera raws are TIFFs whose first directory is a preview. Samples with a depth
other than 8 bits, plain or deflated, are read here: Pillow reads 12 bits as 16, ignores WhiteIsZero
beyond 8 bits, reads plain planes of 16 bits as noise, and does not read other depths. EXIF is a
TIFF too: importing this module limits the memory that Pillow takes for any directory. It knows
nothing about the limits of pictures.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from step1x_edit.errors import CorruptImageError, UnsupportedImageError
from step1x_edit.pictures.formats import CAMERA_RAW

_PREFIXES: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BIG_ENDIAN_BIGTIFF: Final = b"MM\0+"  # Pillow mistakes it for a TIFF
_MAX_DIRECTORIES: Final = 64
_MAX_ENTRIES: Final = 1000

_NEW_SUBFILE_TYPE: Final = 254
_SUBFILE_TYPE: Final = 255
_FILL_ORDER: Final = 266
_XMP: Final = 700
_IPTC: Final = 33723
_ICC_PROFILE: Final = 34675
_DNG_VERSION: Final = 50706

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _LAB = 0, 1, 2, 8
_CHANNELS: Final = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3}
_RAW_PHOTOMETRICS: Final = {32803, 34892}  # a colour filter array, linear raw
_RAW_COMPRESSIONS: Final = {32767, 32769, 32770, 34713, 65000, 65535}  # Sony, Nikon, Kodak, …
_ASSOCIATED, _UNASSOCIATED = 1, 2  # kinds of alpha
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_SEPARATE_PLANES: Final = 2
_UNCOMPRESSED: Final = 1
_DEFLATE: Final = {8, 32946}
_PREDICTOR: Final = 317
_NONE, _HORIZONTAL = 1, 2  # predictors
_ROOM_FOR_DEFLATE: Final = 1024  # bytes; incompressible data grows a little
_MAX_TILE: Final = 2**24  # pixels
_PART: Final = 2**22  # bytes of samples that are unpacked at a time
_MAX_SAMPLES: Final = 5  # per pixel: colours, alpha and one more
_DAMAGED: Final = "the file is damaged or incomplete"

_COMPRESSIONS: Final = {  # supported by the libtiff that Pillow ships
    1: "no",
    2: "CCITT",
    3: "fax",
    4: "fax",
    5: "LZW",
    6: "JPEG",
    7: "JPEG",
    8: "deflate",
    32771: "CCITT",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
}
_OTHER_COMPRESSIONS: Final = {
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_RAW_OF_MAKER: Final = {
    "nikon": "Nikon NEF",
    "sony": "Sony ARW",
    "pentax": "Pentax PEF",
    "ricoh": "Pentax PEF",
    "samsung": "Samsung SRW",
    "hasselblad": "Hasselblad 3FR",
    "phase one": "Phase One IIQ",
    "leaf": "Leaf MOS",
    "seiko epson": "Epson ERF",
    "eastman kodak": "Kodak DCR",
    "kodak": "Kodak DCR",
    "mamiya": "Mamiya MEF",
}


def is_tiff(data: bytes) -> bool:
    """Whether the bytes start like a TIFF or a BigTIFF."""
    return data[:4] in _PREFIXES


@dataclass(frozen=True)
class Directory:
    """One picture of a TIFF, as its tags describe it."""

    tags: ImageFileDirectory_v2
    offset: int

    def number(self, tag: int, default: int) -> int:
        """The value of a tag that holds one number."""
        value = self.tags.get(tag, default)
        if isinstance(value, tuple):
            value = value[0] if value else default
        return int(value)

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The values of a tag that may hold several numbers."""
        value = self.tags.get(tag, ())
        return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)

    def bytes_of(self, tag: int) -> bytes | None:
        """The value of a tag as stored in the file; some programs store bytes as numbers."""
        return self.tags._tagdata.get(tag)

    @property
    def is_full(self) -> bool:
        """Whether this is neither a reduced copy nor a mask; it may be one of several pages."""
        kind = self.number(_NEW_SUBFILE_TYPE, 0)
        return not kind & ~2 and self.number(_SUBFILE_TYPE, 1) != 2

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored, before any rotation."""
        return (
            self.number(ExifTags.Base.ImageWidth, 0),
            self.number(ExifTags.Base.ImageLength, 0),
        )

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.size[0] * self.size[1]

    @property
    def orientation(self) -> int:
        """The orientation of the stored picture, as in EXIF."""
        return self.number(ExifTags.Base.Orientation, 1)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each sample of a pixel."""
        return self.numbers(ExifTags.Base.BitsPerSample) or (1,)

    @property
    def photometric(self) -> int:
        """The photometric interpretation of the samples."""
        return self.number(ExifTags.Base.PhotometricInterpretation, _WHITE_IS_ZERO)

    @property
    def compression(self) -> int:
        """The compression of the samples."""
        return self.number(ExifTags.Base.Compression, _UNCOMPRESSED)

    @property
    def sample_format(self) -> int:
        """Whether the samples are unsigned, signed or floating-point numbers."""
        return max(self.numbers(ExifTags.Base.SampleFormat), default=_UNSIGNED)

    @property
    def iptc(self) -> bytes | None:
        """The IPTC datasets of the picture."""
        return self.bytes_of(_IPTC)

    @property
    def xmp(self) -> bytes | None:
        """The XMP packet of the picture."""
        return self.bytes_of(_XMP)


@dataclass(frozen=True)
class Found:
    """The full picture of a file."""

    data: bytes
    """The file, with this picture first."""
    directory: Directory
    first: Directory
    """The original first directory, which may have the notes of the whole file."""


def opened(data: bytes) -> Found:
    """Find the full picture of a file.

    Raises UnsupportedImageError for a camera raw and for samples that cannot be read.
    """
    if data.startswith(_BIG_ENDIAN_BIGTIFF):
        raise UnsupportedImageError("BigTIFF with its highest byte first; save it as TIFF")
    chains = list(_Walk(data).chains())
    every = [directory for chain in chains for directory in chain]
    raw = _raw_format(data, every)
    if raw is not None:
        raise UnsupportedImageError(f"{raw}, {CAMERA_RAW}")
    if not chains:
        raise CorruptImageError(_DAMAGED)
    chosen = _full_picture(chains[0], every)
    _check_readable(chosen)
    if chosen is not every[0]:
        data = _beginning_at(data, chosen.offset)
    return Found(data, chosen, every[0])


class _Walk:
    """Traverses the directories of a file; stops at loops and hostile sizes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._is_big = data[2:4] in (b"+\0", b"\0+")
        self._order = _order(data[:2])
        self._header = data[: 16 if self._is_big else 8]
        self._seen: set[int] = set()
        # Values that overlap many times would fill the memory; a damaged entry may be large.
        self._bytes_left = 4 * len(data)

    def chains(self) -> Iterator[list[Directory]]:
        """Each directory of the main chain, followed by its children."""
        offset = ImageFileDirectory_v2(self._header).next
        while offset:
            entries = self._entries(offset)
            directory = self._directory(offset, entries)
            if directory is None:
                return
            children = [
                self._directory(child, self._entries(child)) for child in self._children(entries)
            ]
            yield [directory, *(child for child in children if child is not None)]
            offset = directory.tags.next

    def _directory(self, offset: int, entries: list[_Entry]) -> Directory | None:
        """The directory at an offset, unless it was visited or the walk reached its limit."""
        self._bytes_left -= sum(min(entry.size, len(self._data)) for entry in entries)
        is_enough = len(self._seen) == _MAX_DIRECTORIES or self._bytes_left < 0
        if offset in self._seen or not entries or is_enough:
            return None
        self._seen.add(offset)
        tags = ImageFileDirectory_v2(self._header)
        with contextlib.suppress(Exception):  # see images._damaged
            stream = io.BytesIO(self._data)
            stream.seek(offset)
            tags.load(stream)
            directory = Directory(tags, offset)
            if min(directory.size) > 0:
                return directory
        return None

    def _entries(self, offset: int) -> list[_Entry]:
        """The entries of a directory; none if there are more than in any real one."""
        count, entries = _entries_in(
            self._data[offset : offset + _MAX_DIRECTORY], self._order, is_big=self._is_big
        )
        return entries if len(entries) == count <= _MAX_ENTRIES else []

    def _children(self, entries: list[_Entry]) -> list[int]:
        """The offsets of the children; Pillow does not support the BigTIFF type for them."""
        entry = next((one for one in entries if one.tag == ExifTags.Base.SubIFDs), None)
        if entry is None or entry.kind not in _OFFSETS or entry.count > _MAX_DIRECTORIES:
            return []
        values = entry.place[: entry.size]
        if entry.size > len(entry.place):
            (at,) = struct.unpack(self._order + ("Q" if self._is_big else "I"), entry.place)
            values = self._data[at : at + entry.size]
        if len(values) < entry.size:
            return []
        return list(struct.unpack(f"{self._order}{entry.count}{_OFFSETS[entry.kind]}", values))


@dataclass(frozen=True)
class _Entry:
    """A tag as stored in a directory; its values are inside the entry if they fit."""

    tag: int
    kind: int
    count: int
    place: bytes

    @property
    def size(self) -> int:
        """The declared size of the values in bytes."""
        return self.count * _BYTES_OF_TYPE.get(self.kind, 1)

    @property
    def memory(self) -> int:
        """About how many bytes the values take as Python objects."""
        each = 1 if self.kind in _BYTES_OR_TEXT else 280 if self.kind in _RATIONALS else 52
        return self.count * each


_BYTES_OF_TYPE: Final = {
    3: 2,
    4: 4,
    5: 8,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_BYTES_OR_TEXT: Final = (1, 2, 7)
_RATIONALS: Final = (5, 10)
_BYTE_ORDERS: Final[Mapping[str, Literal["little", "big"]]] = {"<": "little", ">": "big"}
_OFFSETS: Final = {4: "I", 13: "I", 16: "Q", 18: "Q"}


def _entries_in(stored: bytes, order: str, *, is_big: bool) -> tuple[int, list[_Entry]]:
    """How many entries the directory at the start of these bytes declares, and those in them."""
    count, entry = ("Q", "HHQ8s") if is_big else ("H", "HHI4s")
    start, size = struct.calcsize(f"={count}"), struct.calcsize(f"={entry}")
    declared = int.from_bytes(stored[:start], _BYTE_ORDERS[order])
    held = min(declared, len(stored[start:]) // size)
    values = struct.iter_unpack(order + entry, stored[start : start + held * size])
    return declared, [_Entry(*each) for each in values]


# --- directories that would fill the memory ------------------------------------------------------

_MAX_DIRECTORY: Final = 8 + 20 * _MAX_ENTRIES  # bytes, without the values
_ALWAYS_LOADED: Final = 2**22  # bytes; the offsets of many small strips take more than the strips

_load: Final = ImageFileDirectory_v2.load


def _load_within_limits(tags: ImageFileDirectory_v2, stream: IO[bytes]) -> None:
    """Load a directory; leave it empty if its values take much more memory than all bytes here.

    A thousand values may be the same large range, and Pillow copies each: in a TIFF, in EXIF in any
    format and in the index of an MPO, and often before it returns the opened file.
    """
    start = stream.tell()
    length = stream.seek(0, io.SEEK_END)
    stream.seek(start)
    count, entries = _entries_in(
        stream.read(_MAX_DIRECTORY), _order(tags.prefix), is_big=tags._bigtiff
    )
    # Pillow stops at a value that is longer than the stream.
    memory = sum(entry.memory for entry in entries if entry.size <= length)
    if count > _MAX_ENTRIES or memory > 2 * length + _ALWAYS_LOADED:
        tags.reset()
        return
    stream.seek(start)
    _load(tags, stream)


# Pillow has no setting for this. A check of the container instead could differ from what a decoder
# finds there: Pillow joins the EXIF segments of a JPEG, for example.
ImageFileDirectory_v2.load = _load_within_limits  # type: ignore[assignment,method-assign]


def _raw_format(data: bytes, directories: list[Directory]) -> str | None:
    """The name of a camera raw format; None for any other TIFF."""
    for name, beginnings in _RAW_HEADERS.items():
        if data[8:12] in beginnings:
            return name
    if any(_DNG_VERSION in directory.tags for directory in directories):
        return "DNG"
    if not any(
        directory.photometric in _RAW_PHOTOMETRICS or directory.compression in _RAW_COMPRESSIONS
        for directory in directories
    ):
        return None
    maker = str(directories[0].tags.get(ExifTags.Base.Make, "")).lower()
    return next(
        (name for start, name in _RAW_OF_MAKER.items() if maker.startswith(start)),
        "a TIFF with raw sensor data",
    )


_RAW_HEADERS: Final = {"Canon CR2": (b"CR\2\0",), "Phase One IIQ": (b"IIII", b"MMMM")}


def _full_picture(first: list[Directory], every: list[Directory]) -> Directory:
    """The full picture: the first directory, unless it is a copy of another one."""
    parent, *children = first
    if not parent.is_full:
        largest = max(every, key=lambda directory: directory.area)
        return next((directory for directory in every if directory.is_full), largest)
    larger = [
        child
        for child in children
        if child.is_full and child.size[0] > parent.size[0] and child.size[1] > parent.size[1]
    ]
    return max(larger, key=lambda directory: directory.area, default=parent)


def _beginning_at(data: bytes, offset: int) -> bytes:
    """The same file with another directory first."""
    order = _order(data[:2])
    if data[2:4] in (b"+\0", b"\0+"):
        return data[:8] + struct.pack(f"{order}Q", offset) + data[16:]
    return data[:4] + struct.pack(f"{order}I", offset) + data[8:]


def _order(prefix: bytes) -> str:
    return ">" if prefix == b"MM" else "<"


def _check_readable(directory: Directory) -> None:
    """Refuse, with its name, what Pillow would misread or refuse without a reason."""
    depth = max(directory.bits)
    if directory.photometric == _LAB:
        raise UnsupportedImageError("TIFF with Lab colours; save it as RGB")
    if directory.sample_format == _FLOAT:
        raise UnsupportedImageError("float TIFF (floating-point pixels); save it with 8 or 16 bits")
    if depth > 16:
        raise UnsupportedImageError(f"TIFF with pixels of {depth} bits; save it with 8 or 16 bits")
    if directory.sample_format == _SIGNED:
        raise UnsupportedImageError("TIFF with signed pixels; save it with 8 or 16 unsigned bits")
    if directory.compression not in _COMPRESSIONS:
        name = _OTHER_COMPRESSIONS.get(directory.compression, f"unknown ({directory.compression})")
        raise UnsupportedImageError(
            f"TIFF with {name} compression; save it with LZW, deflate or no compression"
        )


def describe(directory: Directory) -> str:
    """Describe a TIFF that Pillow does not open."""
    return (
        f"TIFF with {max(directory.bits)}-bit samples, {len(directory.bits)} per pixel, and "
        f"{_COMPRESSIONS[directory.compression]} compression, or a damaged one; "
        "save it as RGB or grey with 8 bits"
    )


# --- samples -------------------------------------------------------------------------------------


def is_read_here(directory: Directory) -> bool:
    """Whether `image_of` reads the samples instead of Pillow."""
    depth = directory.bits[0]
    return (
        directory.compression in {_UNCOMPRESSED, *_DEFLATE}
        and _predictor(directory) in ({_NONE, _HORIZONTAL} if depth == 16 else {_NONE})
        and directory.photometric in _CHANNELS
        and set(directory.bits) == {depth}
        and _samples_of(directory) <= _MAX_SAMPLES
        and (8 < depth <= 16 or depth in (3, 5, 6, 7))
        and directory.number(_FILL_ORDER, 1) == 1
    )


def _predictor(directory: Directory) -> int:
    is_plain = directory.compression == _UNCOMPRESSED
    return _NONE if is_plain else directory.number(_PREDICTOR, _NONE)


def _samples_of(directory: Directory) -> int:
    stated = directory.number(ExifTags.Base.SamplesPerPixel, 1)
    return max(stated, len(directory.bits))


def image_of(data: bytes, directory: Directory) -> Image.Image:
    """The picture with 8 bits per sample, as stored (not rotated), with its metadata in `info`."""
    width, height = directory.size
    colours = _CHANNELS[directory.photometric]
    if _samples_of(directory) < colours:
        raise CorruptImageError(_DAMAGED)
    extra = (directory.numbers(ExifTags.Base.ExtraSamples) or (0,))[0]
    has_alpha = _samples_of(directory) > colours and extra in (_ASSOCIATED, _UNASSOCIATED)
    pixels = np.zeros((height, width, colours + has_alpha), np.uint8)
    table = _to_8_bits(directory)
    for (top, left, channel), values in _parts(data, directory, pixels.shape[2]):
        place = pixels[top : top + len(values), left : left + values.shape[1], channel:]
        place[:, :, : values.shape[2]] = table[values[:, : place.shape[1], : place.shape[2]]]
    if has_alpha and extra == _ASSOCIATED:
        for row in pixels:
            row[:, :colours] = _unmultiplied(row[:, :colours], row[:, colours:])
    image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[:, :, 0])
    image.info.update(
        {
            "icc_profile": directory.bytes_of(_ICC_PROFILE),
            "xmp": directory.xmp,
            "exif": data,  # EXIF is a TIFF
        }
    )
    return image


def at_full_scale(image: Image.Image, directory: Directory) -> Image.Image:
    """16-bit grey as Pillow has read it, as 8 bits from black to white."""
    return Image.fromarray(_to_8_bits(directory)[np.asarray(image).astype(np.uint16)])


def _to_8_bits(directory: Directory) -> npt.NDArray[np.uint8]:
    """The 8-bit value of each stored number, from black to white."""
    highest = 2 ** directory.bits[0] - 1
    table = (np.arange(2**16).clip(max=highest) * 510 + highest) // (2 * highest)
    if directory.photometric == _WHITE_IS_ZERO:
        table[: highest + 1] = table[highest::-1]
    scaled: npt.NDArray[np.uint8] = table.astype(np.uint8)
    return scaled


def _unmultiplied(
    colours: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Colours divided by the alpha that they were multiplied by."""
    divisor = np.maximum(alpha, 1).astype(np.uint16)
    divided = np.minimum((colours.astype(np.uint16) * 255 + divisor // 2) // divisor, 255)
    unmultiplied: npt.NDArray[np.uint8] = divided.astype(np.uint8)
    return unmultiplied


def _parts(
    data: bytes, directory: Directory, channels: int
) -> Iterator[tuple[tuple[int, int, int], npt.NDArray[np.uint16]]]:
    """Some rows at a time of each strip or tile with the first of these channels.

    Each comes with its top, its left and its first channel. A tile may extend beyond the right
    edge, and all samples of a pixel are included if they are stored together.
    """
    width, height = directory.size
    samples = _samples_of(directory)
    is_planar = directory.number(ExifTags.Base.PlanarConfiguration, 1) == _SEPARATE_PLANES
    planes, together = (samples, 1) if is_planar else (1, samples)
    offsets = directory.numbers(ExifTags.Base.TileOffsets)
    lengths = directory.numbers(ExifTags.Base.TileByteCounts)
    is_tiled = bool(offsets)
    if is_tiled:
        across = directory.number(ExifTags.Base.TileWidth, 0)
        down = directory.number(ExifTags.Base.TileLength, 0)
    else:
        offsets = directory.numbers(ExifTags.Base.StripOffsets)
        lengths = directory.numbers(ExifTags.Base.StripByteCounts)
        across = width
        down = min(directory.number(ExifTags.Base.RowsPerStrip, height), height)
    if min(across, down) < (16 if is_tiled else 1) or (is_tiled and across * down > _MAX_TILE):
        raise CorruptImageError(_DAMAGED)
    columns, rows = -(-width // across), -(-height // down)
    if min(len(offsets), len(lengths)) < planes * columns * rows:
        raise CorruptImageError(_DAMAGED)
    stride = (across * together * directory.bits[0] + 7) // 8
    at_once = max(1, _PART // stride)
    for index in range(min(planes, channels) * columns * rows):
        plane, place = divmod(index, columns * rows)
        top, left = place // columns * down, place % columns * across
        stored = min(down, height - top)
        # Many blocks that each claim the whole file would copy it that many times.
        length = min(lengths[index], 2 * down * stride + _ROOM_FOR_DEFLATE)
        block = data[offsets[index] : offsets[index] + length]
        counts = [min(at_once, stored - first) for first in range(0, stored, at_once)]
        for count, part in zip(counts, _inflated(block, counts, stride, directory), strict=True):
            numbers = _unpacked(part, stride, directory)[:, : across * together]
            values = numbers.reshape(count, across, together)
            if _predictor(directory) == _HORIZONTAL:
                values = np.cumsum(values, axis=1, dtype=np.uint16)
            yield (top, left, plane), values
            top += count


def _inflated(
    block: bytes, counts: list[int], stride: int, directory: Directory
) -> Iterator[bytes | memoryview]:
    """The bytes of a strip or tile, for this many rows at a time."""
    inflater, rest = zlib.decompressobj(), memoryview(block)
    for count in counts:
        part: bytes | memoryview
        if directory.compression == _UNCOMPRESSED:
            part, rest = rest[: count * stride], rest[count * stride :]
        else:
            part = inflater.decompress(rest, count * stride)
            rest = memoryview(inflater.unconsumed_tail)
        if len(part) < count * stride:
            raise CorruptImageError(_DAMAGED)
        yield part


def _unpacked(
    block: bytes | memoryview, stride: int, directory: Directory
) -> npt.NDArray[np.uint16]:
    """Rows of numbers; depths other than 16 bits are packed, the highest bit first."""
    depth = directory.bits[0]
    if depth == 16:
        order = _order(directory.tags.prefix)
        return (
            np.frombuffer(block, f"{order}u2")
            .astype(np.uint16, copy=False)
            .reshape(-1, stride // 2)
        )
    weights = 2 ** np.arange(depth - 1, -1, -1, dtype=np.float32)
    rows = np.frombuffer(block, np.uint8).reshape(-1, stride)
    count = stride * 8 // depth
    unpacked = np.empty((len(rows), count), np.uint16)
    for index, row in enumerate(rows):
        unpacked[index] = np.unpackbits(row)[: count * depth].reshape(count, depth) @ weights
    return unpacked
