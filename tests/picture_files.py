"""Picture files as other programs write them, and colours as a colour-managed viewer shows them.

Everything is made from numbers: published primaries and curves, and the layouts of TIFF, PNG and
ICC; nothing here uses the code under test.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageCms

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
ByteOrder = Literal["<", ">"]

D50 = (0.3457, 0.3585)
D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BT_2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))


# --- what is to be seen ---


def scene(width: int = 96, height: int = 64) -> Pixels:
    """sRGB with smooth colours, white, black and a deep red."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([40 + x * 180 // width, 60 + y * 150 // height, 200 - x], axis=-1)
    pixels[:16, :16], pixels[:16, 16:32], pixels[:16, 32:48] = 255, 0, (180, 30, 20)
    return pixels.astype(np.uint8)


def seen(source: bytes | Path) -> Pixels:
    """The picture in sRGB, as a viewer shows it: by its profile, or as sRGB if it has none."""
    data = source.read_bytes() if isinstance(source, Path) else source
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        profile, rgb = image.info.get("icc_profile"), image.convert("RGB")
    if profile is not None:
        managed = ImageCms.profileToProfile(
            rgb,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        assert managed is not None
        rgb = managed
    return np.array(rgb)


def difference(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """The mean difference in levels."""
    return float(np.abs(np.asarray(left, float) - np.asarray(right, float)).mean())


# --- colour ---


def linear(srgb: npt.ArrayLike) -> Floats:
    """Light, 0 to 1, of sRGB levels."""
    value = np.asarray(srgb, float) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def encoded(light: Floats) -> Floats:
    """sRGB, 0 to 1, of light."""
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def levels(values: Floats) -> Pixels:
    """8 bits of values from 0 to 1."""
    rounded: Pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return rounded


def to_xyz(primaries: tuple[tuple[float, float], ...], white: tuple[float, float] = D65) -> Floats:
    """The matrix from light in these primaries, with this white, to XYZ."""

    def column(point: tuple[float, float]) -> list[float]:
        x, y = point
        return [x / y, 1.0, (1 - x - y) / y]

    columns = np.array([column(point) for point in primaries]).T
    matrix: Floats = columns * np.linalg.solve(columns, column(white))
    return matrix


def to_pcs(primaries: tuple[tuple[float, float], ...], white: tuple[float, float] = D65) -> Floats:
    """The matrix from light in these primaries to XYZ under D50, as profiles state it."""
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    matrix = to_xyz(primaries, white)
    cones = bradford @ matrix
    gains = bradford @ np.array(PCS_WHITE) / cones.sum(axis=1)
    adapted: Floats = np.linalg.inv(bradford) @ (gains[:, None] * cones)
    return adapted


def in_primaries(srgb: Pixels, primaries: tuple[tuple[float, float], ...]) -> Floats:
    """Light of a picture in other primaries."""
    matrix = np.linalg.inv(to_xyz(primaries)) @ to_xyz(SRGB)
    light: Floats = (linear(srgb) @ matrix.T).clip(0, None)
    return light


def pq(nits: npt.ArrayLike) -> Floats:
    """SMPTE ST 2084, as specified there."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (np.asarray(nits, float) / 10_000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def hlg(display: Floats) -> Floats:
    """HLG of light on a display of 1000 cd/m², in BT.2020 primaries: ITU-R BT.2100."""
    luminance = np.maximum(display @ to_xyz(BT_2020)[1] / 1000, 1e-9)
    scene_light = display / 1000 * (luminance ** ((1 - 1.2) / 1.2))[..., None]
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    upper = a * np.log(np.maximum(12 * scene_light - b, 1e-9)) + c
    signal: Floats = np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), upper)
    return signal


# --- PNG ---


def png(pixels: npt.NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with further chunks after its header."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + b"".join(_chunk(*chunk) for chunk in chunks) + data[33:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def cicp(primaries: int, transfer: int, is_full_range: bool = True) -> tuple[bytes, bytes]:
    """The chunk in which a PNG states its colours as code points."""
    return b"cICP", bytes([primaries, transfer, 0, is_full_range])


# --- AVIF ---


def with_nclx(avif: bytes, primaries: int, transfer: int) -> bytes:
    """An AVIF whose colr box contains other code points."""
    at = avif.index(b"nclx") + 4
    return avif[:at] + struct.pack(">HH", primaries, transfer) + avif[at + 4 :]


# --- TIFF ---


def tiff(
    pixels: npt.NDArray[Any], order: ByteOrder = "<", big: bool = False, **options: Any
) -> bytes:
    """A TIFF of one picture, written by tifffile."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=order, bigtiff=big) as writer:
        writer.write(pixels, metadata=None, **options)
    return buffer.getvalue()


def tiff_of_planes(pixels: npt.NDArray[Any], order: ByteOrder = "<", **options: Any) -> bytes:
    """A TIFF that stores red, green and blue one after the other."""
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return tiff(planes, order, photometric="rgb", planarconfig="separate", **options)


def packed_tiff(
    values: npt.NDArray[Any], bits: int, photometric: int, order: ByteOrder = "<"
) -> bytes:
    """An uncompressed TIFF with any number of bits per sample, packed as in TIFF 6.0."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    strip = b""
    for row in values.reshape(height, width * samples):
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        strip += int(text, 2).to_bytes(len(text) // 8, "big")
    entries = 9
    depths = struct.pack(f"{order}{samples}H", *[bits] * samples)
    behind = 8 + 2 + 12 * entries + 4
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, samples, bits if samples == 1 else behind),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, behind + len(depths)),
        (277, 3, 1, samples),
        (278, 4, 1, height),
        (279, 4, 1, len(strip)),
    ]
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, entries)
    for tag, kind, count, value in tags:
        data += struct.pack(f"{order}HHI", tag, kind, count)
        is_short = kind == 3 and count == 1
        data += struct.pack(f"{order}HH" if is_short else f"{order}I", value, *[0] * is_short)
    return data + struct.pack(f"{order}I", 0) + depths + strip


# --- ICC ---

PCS_WHITE = (0.9642, 1.0, 0.8249)
INKS_L = {"paper": 100.0, "black ink": 30.0, "all inks": 12.0}
"""The lightness that `cmyk_profile` has measured, all of it neutral."""
_PLEASING_BLACK = 45.0
"""The lightness of black ink in its table for the perceptual intent."""


def cmyk_profile(padding: int = 0) -> bytes:
    """A printing profile: any coloured inks are a grey, darker with black ink."""

    def lab(black_ink: float) -> list[tuple[int, ...]]:
        grid: list[tuple[int, ...]] = []
        for index in range(16):  # cyan varies slowest, black fastest
            colours, black = bin(index >> 1).count("1"), index & 1
            lightness = black_ink if black else (100.0, 70.0, 50.0, 35.0)[colours]
            if black and colours == 3:
                lightness = INKS_L["all inks"]
            grid.append((round(lightness * 0xFF00 / 100), 0x8000, 0x8000))
        return grid

    # lightness varies slowest
    inks: list[tuple[int, ...]] = [(0xFFFF if index < 4 else 0,) * 4 for index in range(8)]
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + _fixed(0.9642, 1.0, 0.8249),
        b"A2B0": _table(4, 3, lab(_PLEASING_BLACK)),
        b"A2B1": _table(4, 3, lab(INKS_L["black ink"])),
        b"B2A0": _table(3, 4, inks),
        b"B2A1": _table(3, 4, inks),
        b"test": b"test" + bytes(4 + padding),
    }
    return _profile(b"prtr", b"CMYK", b"Lab ", tags)


def rgb_profile(
    primaries: tuple[tuple[float, float], ...],
    gamma: float | None = None,
    white: tuple[float, float] = D65,
    codes: tuple[int, int] | None = None,
) -> bytes:
    """A profile of a display with these primaries and a gamma, or else the curve of sRGB.

    `codes` are what it states besides, by its tag cicp: primaries and transfer.
    """
    # The type "para": a power, or the five numbers of sRGB.
    curve = (0, gamma) if gamma else (3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    shape = b"para" + bytes(4) + struct.pack(">H2x", int(curve[0])) + _fixed(*curve[1:])
    red, green, blue = to_pcs(primaries, white).T
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + _fixed(*PCS_WHITE),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), shape),
        b"rXYZ": b"XYZ " + bytes(4) + _fixed(*red),
        b"gXYZ": b"XYZ " + bytes(4) + _fixed(*green),
        b"bXYZ": b"XYZ " + bytes(4) + _fixed(*blue),
    }
    if codes is not None:
        tags[b"cicp"] = b"cicp" + bytes(4) + bytes([*codes, 0, 1])
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags, version=4)


def table_profile(*directions: bytes) -> bytes:
    """Adobe RGB by tables, as printers have them: A2B0 leads from RGB, and B2A0 back."""
    matrix, levels = to_pcs(ADOBE_RGB), np.linspace(0, 1, 1024)
    one = 0x8000 / 0xFFFF  # of XYZ as a table holds it
    corners = np.array([*np.ndindex(2, 2, 2)]) @ matrix.T * one
    to_light, to_rgb = levels**2.2, levels ** (1 / 2.2)
    tables = {
        b"A2B0": _table(3, 3, _shorts(corners), curve_in=to_light),
        b"B2A0": _table(
            3,
            3,
            _shorts(np.array([*np.ndindex(2, 2, 2)])),
            matrix=np.asarray(np.linalg.inv(matrix) / one, float),
            curve_out=to_rgb,
        ),
    }
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + _fixed(*PCS_WHITE),
        **{name: tables[name] for name in directions},
    }
    return _profile(b"prtr" if len(directions) == 2 else b"scnr", b"RGB ", b"XYZ ", tags)


def _shorts(values: Floats) -> list[tuple[int, ...]]:
    return [tuple(row) for row in (values * 0xFFFF).round().astype(int).tolist()]


def grey_profile(gamma: float) -> bytes:
    """A profile for grey with a gamma."""
    curve = struct.pack(">IH", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + _fixed(0.9642, 1.0, 0.8249),
        b"kTRC": b"curv" + bytes(4) + curve,
    }
    return _profile(b"mntr", b"GRAY", b"XYZ ", tags)


def swapped_profile(padding: int = 0) -> bytes:
    """A profile that shows red as blue and blue as red."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {}
    for at in range(132, 132 + 12 * int.from_bytes(srgb[128:132], "big"), 12):
        name, offset, size = struct.unpack_from(">4sII", srgb, at)
        name = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
        tags[name] = srgb[offset : offset + size]
    tags[b"test"] = b"test" + bytes(4 + padding)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags, version=4)


def _profile(
    kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes], version: int = 2
) -> bytes:
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s", size, version << 24, kind, space, connection, b"acsp")
    return header + bytes(28) + _fixed(0.9642, 1.0, 0.8249) + bytes(48) + table + body


def _table(
    inputs: int,
    outputs: int,
    grid: list[tuple[int, ...]],
    matrix: Floats = np.identity(3),
    curve_in: npt.ArrayLike = (0, 1),
    curve_out: npt.ArrayLike = (0, 1),
) -> bytes:
    """A lut16Type with two points along each side."""
    head = struct.pack(">4s4xBBBx", b"mft2", inputs, outputs, 2) + _fixed(*matrix.flat)
    before, after = (_curve(each) for each in (curve_in, curve_out))
    head += struct.pack(">HH", len(before) // 2, len(after) // 2)
    values = b"".join(struct.pack(f">{outputs}H", *entry) for entry in grid)
    return head + before * inputs + values + after * outputs


def _curve(points: npt.ArrayLike) -> bytes:
    return bytes((np.asarray(points, float) * 0xFFFF).round().astype(">u2"))


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))
