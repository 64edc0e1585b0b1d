"""Colour: the meaning of a picture's numbers, and their conversion to sRGB and back.

A file states it by an ICC profile, by code points (ITU-T H.273 in PNG and AVIF, gamma and
chromaticities in PNG), or by a camera's mark for Adobe RGB. Coded colours are converted to the sRGB
curve with the file's own primaries, which a profile made here states. HDR (PQ and HLG) is converted
to SDR by the EETF of ITU-R BT.2390. A picture is edited in sRGB, and the edit is brought back into
its profile. This module knows nothing about files.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from step1x_edit.errors import UnsupportedImageError
from step1x_edit.pictures.output_formats import MAX_PROFILE_BYTES

Pixels = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
_Matrix = npt.NDArray[np.float64]


# --- profiles ------------------------------------------------------------------------------------


def usable(profile: bytes | None) -> bytes | None:
    """The profile if it is valid; a damaged one would harm the programs that open the result."""
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return None
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return profile


_AWAY: Final = 8  # levels; linear light in 8 bits is off by 7


def is_for_results(profile: bytes | None) -> bool:
    """Whether a picture can be edited in sRGB and then brought back into the profile.

    It must describe RGB (bytes 16 to 20 of its header), in both directions, and hold all greys:
    some curves cannot be undone with 8 bits.
    """
    if profile is None or profile[16:20] != b"RGB ":
        return False
    greys = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    try:
        there, back = _transform(None, profile), _transform(profile, None)
    except ImageCms.PyCMSError:
        return False
    returned = np.asarray(back.apply(there.apply(Image.fromarray(greys))), np.int16)
    return bool(np.abs(returned - greys).max() <= _AWAY)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert by the profile; None if the profile is not usable for this picture."""
    try:
        converted = ImageCms.applyTransform(image, _transform(profile, None, image.mode))
    except (ImageCms.PyCMSError, ValueError):
        return None
    if converted is not None:
        converted.info.pop("icc_profile", None)  # sRGB needs none, and its date would vary
    return converted


def _transform(
    source: bytes | None, target: bytes | None, mode: str = "RGB"
) -> ImageCms.ImageCmsTransform:
    """From one profile to another, for RGB; None is sRGB. Raises PyCMSError if there is no way.

    Relative colorimetric with black point compensation: white becomes white, and the darkest tone
    becomes black.
    """
    return ImageCms.buildTransform(
        _opened(source),
        _opened(target),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _opened(profile: bytes | None) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB") if profile is None else io.BytesIO(profile)
    )


# --- an edit in sRGB, and back -------------------------------------------------------------------

_SRGB_TOLERANCE: Final = 0.5  # levels, on average; a plain gamma of 2.2 is off by 1.3
_COLOURS: Final = (np.indices((9, 9, 9)).reshape(3, 1, -1).T * 255 // 8).astype(np.uint8)
_ROWS: Final = 256  # computed together


def in_srgb(pixels: Pixels, profile: bytes | None) -> Pixels:
    """The pixels of a picture (H, W, 3) in sRGB; the same ones if its profile is that of sRGB."""
    if profile is None or _is_srgb(profile):
        return pixels
    return _applied(_transform(profile, None), pixels)


def in_profile(edited: Pixels, given: Pixels, source: Pixels, profile: bytes | None) -> Pixels:
    """The edit of `given`, the source in sRGB, as an edit of the source; all are (H, W, 3).

    sRGB cannot express all colours of a wider profile. With a source pixel v, its colour n in sRGB,
    the edit e of it, and the conversion P from sRGB to the profile, the result is

        P(e) + k·(v - P(n)),  k = <c(e), c(n)> / <c(n), c(n)>, limited to 0 … 1

    where c is a colour without its grey (minus the mean of the three channels): what n lost of the
    source's colour returns in the proportion in which the edit kept the colour of n. An edit that
    changes nothing returns the source exactly; black and white is neutral, and a colour of another
    hue is that of e. Values are encoded: for a curve that is a power, as most are, this is exact
    under any change of exposure, as it would be in linear light.
    """
    if given is source:
        return edited
    back = _transform(None, profile)
    result = np.empty_like(source)
    for top in range(0, len(source), _ROWS):
        rows = slice(top, top + _ROWS)
        lost: _Floats = _applied(back, given[rows]).astype(np.float32)
        np.subtract(source[rows], lost, out=lost)
        lost *= _kept(given[rows], edited[rows])[..., None]
        lost += _applied(back, edited[rows])
        result[rows] = np.rint(lost, out=lost).clip(0, 255, out=lost)
    return result


_WITHOUT_GREY: Final = np.identity(3, np.float32) * 3 - 1


def _kept(given: Pixels, edited: Pixels) -> _Floats:
    """The share of its own colour that each pixel kept; all of it if it was and is grey."""
    colour = given.astype(np.float32) @ _WITHOUT_GREY
    kept = np.einsum("...c,...c", edited, colour) + 1
    share: _Floats = (kept / (np.einsum("...c,...c", given, colour) + 1)).clip(0, 1)
    return share


def _is_srgb(profile: bytes) -> bool:
    """Whether colours have the same numbers as in sRGB, but for the rounding of its variants."""
    difference = _applied(_transform(profile, None), _COLOURS) - _COLOURS.astype(np.float32)
    return bool(np.abs(difference).mean() <= _SRGB_TOLERANCE)


def _applied(transform: ImageCms.ImageCmsTransform, pixels: Pixels) -> Pixels:
    return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))


# --- colour by numbers ---------------------------------------------------------------------------

_Point = tuple[float, float]
_D65: Final = (0.3127, 0.3290)
_C: Final = (0.310, 0.316)


@dataclass(frozen=True)
class Primaries:
    """CIE 1931 chromaticities of full red, green, blue and of white."""

    red: _Point
    green: _Point
    blue: _Point
    white: _Point = _D65

    @property
    def is_srgb(self) -> bool:
        """Whether these are the sRGB primaries, as exactly as files state them."""
        return bool(np.allclose(self._points(), SRGB._points(), atol=0.003))

    def _points(self) -> tuple[_Point, ...]:
        return self.red, self.green, self.blue, self.white

    def to_xyz(self) -> _Matrix:
        """The matrix from linear RGB to XYZ in which white has Y = 1."""
        columns = np.array([_xyz(point) for point in (self.red, self.green, self.blue)]).T
        scaled: _Matrix = columns * np.linalg.solve(columns, _xyz(self.white))
        return scaled


def _xyz(point: _Point) -> _Matrix:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


SRGB: Final = Primaries((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_ADOBE_RGB: Final = Primaries((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
_ADOBE_RGB_GAMMA: Final = 563 / 256

# ITU-T H.273, table 2; unlisted values are unspecified or reserved.
_PRIMARIES: Final = {
    1: SRGB,
    4: Primaries((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), _C),
    5: Primaries((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: Primaries((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: Primaries((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    8: Primaries((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), _C),
    9: Primaries((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: Primaries((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: Primaries((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    22: Primaries((0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
# Table 3. The television curves (1, 6, 14, 15 …) are shown with the sRGB curve, as browsers do.
_GAMMAS: Final = {4: 2.2, 5: 2.8, 8: 1.0}
_PQ, _HLG = 16, 18
_HDR: Final = {_PQ: "PQ", _HLG: "HLG"}
_UNUSABLE_TRANSFERS: Final = {9, 10, 17}  # logarithmic ones, and the one of cinema projectors
_UNUSABLE_PRIMARIES: Final = {10}  # CIE XYZ


@dataclass(frozen=True)
class Cicp:
    """Coding-independent code points: the colour codes of ITU-T H.273 in a file."""

    primaries: int
    transfer: int
    is_full_range: bool = True
    outrank_profile: bool = False
    """Whether the codes take precedence over a profile in the same file."""


@dataclass(frozen=True)
class Shown:
    """8-bit RGB that a viewer shows correctly: as sRGB, or with the profile."""

    pixels: Pixels
    profile: bytes | None = None
    warning: str | None = None


def by_cicp(pixels: Pixels, cicp: Cicp) -> Shown:
    """Pixels (H, W, 3) of a file with coded colours; HDR is tone-mapped."""
    if cicp.transfer in _UNUSABLE_TRANSFERS or cicp.primaries in _UNUSABLE_PRIMARIES:
        raise UnsupportedImageError(
            f"colours with the codes {cicp.primaries} and {cicp.transfer} of ITU-T H.273; "
            "save it as sRGB"
        )
    primaries = _PRIMARIES.get(cicp.primaries, SRGB)
    if not cicp.is_full_range:
        pixels = ((np.arange(256) - 16) * 255 / 219).round().clip(0, 255).astype(np.uint8)[pixels]
    if cicp.transfer in _HDR:
        return Shown(
            _tone_mapped(pixels, primaries, cicp.transfer),
            warning=f"the picture is HDR ({_HDR[cicp.transfer]}); it was tone-mapped to SDR by the "
            "EETF of ITU-R BT.2390",
        )
    return _with_srgb_curve(pixels, primaries, _GAMMAS.get(cicp.transfer))


def hdr_in(profile: bytes) -> Cicp | None:
    """The code points of a profile of HDR, from its tag cicp; None if it is not one."""
    tags = min(int.from_bytes(profile[128:132], "big"), (len(profile) - 132) // 12)
    for name, offset, _ in struct.iter_unpack(">4sII", profile[132 : 132 + 12 * tags]):
        codes = profile[offset + 8 : offset + 12]  # after the type of the tag
        if name == b"cicp" and len(codes) == 4 and codes[1] in _HDR:
            return Cicp(codes[0], codes[1], is_full_range=bool(codes[3]))
    return None


def by_gamma(pixels: Pixels, gamma: float, chromaticities: tuple[float, ...] | None) -> Shown:
    """Pixels (H, W, 3) of a PNG with gAMA, the exponent of its encoder, and cHRM if present."""
    primaries = SRGB
    if chromaticities is not None and len(chromaticities) == 8:
        white, red, green, blue = (
            (chromaticities[at], chromaticities[at + 1]) for at in range(0, 8, 2)
        )
        if all(y > 0 and x >= 0 and x + y <= 1 for x, y in (white, red, green, blue)):
            primaries = Primaries(red, green, blue, white)
    is_usual = abs(gamma * 2.2 - 1) < 0.05  # libpng treats this as sRGB too
    return _with_srgb_curve(pixels, primaries, None if is_usual else 1 / gamma)


def _with_srgb_curve(pixels: Pixels, primaries: Primaries, gamma: float | None) -> Shown:
    """The pixels with the sRGB curve, and a profile if the primaries are not those of sRGB."""
    if gamma is not None:
        linear = np.linspace(0, 1, 256, dtype=np.float32) ** np.float32(gamma)
        pixels = _srgb_encoded(linear)[pixels]
    if primaries.is_srgb:
        return Shown(pixels)
    return Shown(pixels, made_profile("RGB by numbers, sRGB curve", primaries))


def _srgb_encoded(linear: _Floats) -> Pixels:
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    pixels: Pixels = (encoded * 255).round().astype(np.uint8)
    return pixels


# --- HDR -----------------------------------------------------------------------------------------

_SDR_WHITE: Final = 203.0  # cd/m², the diffuse white of HDR pictures, ITU-R BT.2408
_HLG_PEAK: Final = 1000.0  # cd/m², the display for which HLG is specified, ITU-R BT.2100
_HLG_SYSTEM_GAMMA: Final = 1.2
_HIGHLIGHTS: Final = 0.001  # the share of pixels that may become plain white
_BINS: Final = 4096

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def _tone_mapped(pixels: Pixels, primaries: Primaries, transfer: int) -> Pixels:
    """sRGB of an HDR picture.

    The EETF is applied to the largest of the three channels, so that the hue is kept. Its source
    peak is the brightness that all but the smallest highlights stay below: SDR content in an HDR
    file is unchanged. Colours outside sRGB are clipped.
    """
    histogram = np.zeros(_BINS, np.int64)
    for _, light in _light(pixels, primaries, transfer):
        brightest = _pq(light.max(axis=-1))
        histogram += np.histogram(brightest, _BINS, (0, 1))[0]
    below = np.cumsum(histogram) / histogram.sum()
    peak = _nits(np.float32((np.searchsorted(below, 1 - _HIGHLIGHTS) + 1) / _BINS))
    to_srgb = (np.linalg.inv(SRGB.to_xyz()) @ _adapted(primaries, _D65)).astype(np.float32)
    shown = np.empty_like(pixels)
    for rows, light in _light(pixels, primaries, transfer):
        brightest = light.max(axis=-1, keepdims=True)
        gain = _eetf(brightest, float(peak)) / np.maximum(brightest, 1e-4)
        shown[rows] = _srgb_encoded(light * gain / np.float32(_SDR_WHITE) @ to_srgb.T)
    return shown


def _light(pixels: Pixels, primaries: Primaries, transfer: int) -> Iterator[tuple[slice, _Floats]]:
    """Linear light on a display in cd/m², some rows at a time."""
    codes = np.linspace(0, 1, 256, dtype=np.float32)
    table = _nits(codes) if transfer == _PQ else _scene_light(codes)
    luminance = primaries.to_xyz()[1].astype(np.float32)
    for top in range(0, len(pixels), _ROWS):
        rows = slice(top, top + _ROWS)
        light: _Floats = table[pixels[rows]]
        if transfer == _HLG:
            scene = np.maximum(light @ luminance, 1e-6)[..., None]
            light = light * scene ** np.float32(_HLG_SYSTEM_GAMMA - 1) * np.float32(_HLG_PEAK)
        yield rows, light


def _scene_light(codes: _Floats) -> _Floats:
    """The inverse OETF of HLG, ITU-R BT.2100 table 5."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
    return light.astype(np.float32)


def _nits(codes: _Floats | np.float32) -> _Floats:
    """The EOTF of PQ, ITU-R BT.2100 table 4: cd/m² of codes from 0 to 1."""
    root = np.asarray(codes, np.float32) ** np.float32(1 / _M2)
    linear = np.maximum(root - _C1, 0) / (_C2 - _C3 * root)
    nits: _Floats = (10_000 * linear ** (1 / _M1)).astype(np.float32)
    return nits


def _pq(nits: _Floats | float) -> _Floats:
    """The inverse of `_nits`."""
    power = (np.asarray(nits, np.float32) / 10_000) ** np.float32(_M1)
    codes: _Floats = (((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2).astype(np.float32)
    return codes


def _eetf(nits: _Floats, peak: float) -> _Floats:
    """ITU-R BT.2390, 5.4.1: compresses light up to `peak` below SDR white; dark parts are kept."""
    if peak <= _SDR_WHITE:
        return nits
    source_peak = float(_pq(peak))
    highest = float(_pq(_SDR_WHITE)) / source_peak
    knee = 1.5 * highest - 0.5
    value = np.minimum(_pq(nits) / source_peak, 1)
    t = (value - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * highest
    )
    return _nits((np.where(value < knee, value, spline) * source_peak).astype(np.float32))


# --- making a profile ----------------------------------------------------------------------------

_D50_XYZ: Final = (0.9642, 1.0, 0.8249)  # as ICC.1 rounds it
_BRADFORD: Final = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_CURVE_POINTS: Final = 1024


def adobe_rgb_profile() -> bytes:
    """A profile for pictures that cameras mark as Adobe RGB (1998)."""
    curve = struct.pack(">I H", 1, round(_ADOBE_RGB_GAMMA * 256))
    return _profile("Compatible with Adobe RGB (1998)", _ADOBE_RGB, curve)


def made_profile(name: str, primaries: Primaries) -> bytes:
    """A display profile with these primaries and the sRGB curve."""
    encoded = np.linspace(0, 1, _CURVE_POINTS)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    points = (linear * 0xFFFF).round().astype(">u2").tobytes()
    return _profile(name, primaries, struct.pack(">I", _CURVE_POINTS) + points)


def _profile(name: str, primaries: Primaries, curve: bytes) -> bytes:
    """An ICC profile of version 2.4, with one curve for all three channels."""
    ascii_name = name.encode("ascii") + b"\0"
    length = struct.pack(">I", len(ascii_name))
    columns = _adapted(primaries, _D50_XYZ).T
    tags = {
        (b"desc",): b"desc" + bytes(4) + length + ascii_name + bytes(78),
        (b"cprt",): b"text" + bytes(4) + b"No copyright, use freely\0",
        (b"wtpt",): _xyz_tag(_D50_XYZ),
        (b"rXYZ",): _xyz_tag(columns[0]),
        (b"gXYZ",): _xyz_tag(columns[1]),
        (b"bXYZ",): _xyz_tag(columns[2]),
        (b"rTRC", b"gTRC", b"bTRC"): b"curv" + bytes(4) + curve,
    }
    table, body = b"", b""
    count = sum(map(len, tags))
    for names, content in tags.items():
        offset = 128 + 4 + 12 * count + len(body)
        table += b"".join(one + struct.pack(">II", offset, len(content)) for one in names)
        body += content + bytes(-len(content) % 4)
    size = 128 + 4 + len(table) + len(body)
    header = struct.pack(
        ">I4xI4s4s4s6H4s24xI12s48x",
        size,
        0x02400000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        *(2026, 1, 1, 0, 0, 0),  # fixed: equal pictures give equal bytes
        b"acsp",
        0,
        _fixed(_D50_XYZ),
    )
    return header + struct.pack(">I", count) + table + body


def _xyz_tag(values: npt.ArrayLike) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _fixed(values: npt.ArrayLike) -> bytes:
    return bytes((np.asarray(values, np.float64) * 65536).round().astype(">i4"))


def _adapted(primaries: Primaries, white: tuple[float, ...]) -> _Matrix:
    """The matrix to XYZ under another white, a chromaticity or XYZ, adapted with Bradford."""
    target = _xyz((white[0], white[1])) if len(white) == 2 else np.array(white)
    gains = (_BRADFORD @ target) / (_BRADFORD @ _xyz(primaries.white))
    adaptation = np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD
    adapted: _Matrix = adaptation @ primaries.to_xyz()
    return adapted
