"""Pictures: bytes to upright RGB and back to bytes, with the metadata that must survive an edit.

Limits are checked on the header, before a pixel is decoded. The decoders are an explicit list, and
the content decides the format, not the name. A picture is 8-bit RGB as a viewer shows it:

- EXIF orientation is applied; of animations and stacks only the first picture is used;
- 16-bit grey is scaled, palettes are expanded, CMYK and grey with a profile are converted to sRGB;
- an RGB colour profile is kept; colours described in another way get a profile or are converted to
  sRGB (see colour). The network sees sRGB, and its edit is brought back into the profile;
- alpha is kept separately; colours hidden under full transparency become white.

This module knows nothing about paths, folders and the model.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFilter,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from step1x_edit.errors import (
    CorruptImageError,
    ImageAspectError,
    ImageError,
    ImageTooLargeError,
    ImageTooSmallError,
    InvalidParameterError,
    UnsupportedImageError,
)
from step1x_edit.pictures import colour, heic, tiff
from step1x_edit.pictures.colour import Cicp, Shown
from step1x_edit.pictures.formats import (
    colour_numbers,
    has_gain_map,
    is_heic,
    is_png,
    name_of,
    with_end_marker,
)
from step1x_edit.pictures.notes import (
    RECORD_KEY,
    Notes,
    add_jpeg_tags,
    exif_in,
    exif_of,
    exif_with,
    is_marked_adobe_rgb,
    notes_of,
    record_of,
    written,
)
from step1x_edit.pictures.output_formats import (
    BMP,
    JPEG,
    MAX_PROFILE_BYTES,
    OUTPUT_FORMATS,
    PNG,
    TIFF,
    OutputFormat,
)
from step1x_edit.pictures.provenance import packet_of
from step1x_edit.schemas.requests import EditRecord, Record
from step1x_edit.settings import Limits

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]

# Pillow only finds a decoder by name after its module is imported.
DECODERS: Final = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
        AvifImagePlugin.AvifImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
    )
)

MIN_SIDE: Final = 16  # pixels; one token of the network covers this much
MAX_ASPECT_RATIO: Final = 16  # at 512 pixels squared the shorter side still has 128

FEATHER: Final = 0.01  # of the longer side: width of the soft edge inside a mask
MIN_FEATHER: Final = 2  # pixels
MAX_FEATHER: Final = 64  # pixels; each needs one more pass over the masked part

PREVIEW_SIDE: Final = 512
PREVIEW_BASE64_BYTES: Final = 96 * 1024  # the limit of chat hosts
ROUND_BASE64_BYTES: Final = 48 * 1024  # one result contains several besides the preview

_MAX_BLUR: Final = 3  # pixels; the steps of a hard mask are one pixel high
_NO_END: Final = "the JPEG lacks its end marker; its picture is complete"
_NO_GAIN_MAP: Final = "the picture's gain map for HDR was dropped; the result is SDR"
_OTHER_BYTES: Final = bytes([0x5A]) * 64
_PNG_DEPTH_AT: Final = 24
_PNG_XMP_KEY: Final = "XML:com.adobe.xmp"
_PNG_SOFTWARE_KEY: Final = "Software"

# Pillow refuses a PNG with a longer profile; its own limit is 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES


@dataclass(frozen=True)
class Picture:
    """An upright picture and its metadata."""

    pixels: Pixels  # (H, W, 3)
    alpha: Pixels | None = None  # (H, W)
    icc_profile: bytes | None = None
    notes: Notes = Notes()
    warning: str | None = None
    """What was unusual about the file, for the answer."""

    @property
    def width(self) -> int:
        """Width in pixels, upright."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in pixels, upright."""
        return int(self.pixels.shape[0])

    @cached_property
    def in_srgb(self) -> Pixels:
        """The pixels in sRGB, as the network sees them; the same array if they are sRGB."""
        return colour.in_srgb(self.pixels, self.icc_profile)


# --- decoding ------------------------------------------------------------------------------------


def decode(data: bytes, limits: Limits) -> Picture:
    """Read a picture; raises an ImageError that says what is wrong with it."""

    def check(width: int, height: int) -> None:
        check_size(width, height, limits)

    def read(data: bytes) -> Picture:
        return _picture(_stored(data, limits, check))

    picture, lacks_end = _read_to_the_end(data, read, _same_pixels)
    warnings = (
        picture.warning,
        _NO_GAIN_MAP if has_gain_map(data) else None,
        _NO_END if lacks_end else None,
    )
    return replace(picture, warning="; ".join(filter(None, warnings)) or None)


def format_of(data: bytes) -> str:
    """The name of the format of a picture that `decode` reads."""
    if tiff.is_tiff(data):
        return TIFF.name
    with Image.open(io.BytesIO(data), formats=_decoders_for(data)) as image:
        # The JPEGs of some cameras contain several pictures.
        return JPEG.name if image.format == "MPO" else str(image.format)


def decode_mask(data: bytes, limits: Limits, size: tuple[int, int]) -> Pixels:
    """How far each pixel may change, from 0 (unchanged) to 255, as (H, W).

    If the mask has transparency, its transparent parts may change; otherwise its brightness counts:
    white parts may change. Raises an ImageError as `decode` does, and InvalidParameterError if the
    upright mask does not have the size (width, height) of the upright picture, or lets nothing
    change.
    """

    def check(width: int, height: int) -> None:
        _check_pixels(width, height, limits)

    def read(data: bytes) -> Pixels:
        return _mask(_stored(data, limits, check).image)

    mask, _ = _read_to_the_end(data, read, np.array_equal)
    height, width = mask.shape
    if (width, height) != size:
        raise InvalidParameterError(
            f"mask is {width}×{height} pixels, the picture is {size[0]}×{size[1]}; "
            "both must have the same size",
            param="mask",
        )
    if not mask.any():
        raise InvalidParameterError(
            "mask selects nothing; make what may change white, or transparent",
            param="mask",
        )
    return mask


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise the error that `decode` would raise for a picture of this size."""
    _check_pixels(width, height, limits)
    _check_shape(width, height)


def check_enlarged(width: int, height: int, factor: int, limits: Limits) -> None:
    """Raise InvalidParameterError if a picture of this size may not be enlarged so many times."""
    if factor**2 * width * height > limits.max_pixels:
        raise InvalidParameterError(
            f"upscale {factor} would make {factor * width}×{factor * height} pixels of "
            f"{width}×{height}, at most {limits.max_pixels / 1e6:g} megapixels (MAX_MEGAPIXELS) "
            "are allowed",
            param="upscale",
        )


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"{width}×{height} pixels, at most {limits.max_pixels / 1e6:g} megapixels are allowed"
        )


def _check_shape(width: int, height: int) -> None:
    size = f"{width}×{height} pixels"
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageAspectError(
            f"{size}, the longer side may be at most {MAX_ASPECT_RATIO} times the shorter one"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageTooSmallError(f"{size}, at least {MIN_SIDE}×{MIN_SIDE} are needed")


def _read_to_the_end(
    data: bytes, read: Callable[[bytes], T], is_same: Callable[[T, T], bool]
) -> tuple[T, bool]:
    """The result of `read`, and whether the file is a JPEG that lacks only its end marker.

    Only then can other bytes before the end change nothing: in a truncated scan they would be
    decoded as pixels.
    """
    try:
        return read(data), False
    except CorruptImageError:
        mended = with_end_marker(data)
        if mended is None:
            raise
        found = read(mended)
        if not is_same(found, read(mended[:-2] + _OTHER_BYTES + mended[-2:])):
            raise
        return found, True


def _same_pixels(left: Picture, right: Picture) -> bool:
    return np.array_equal(left.pixels, right.pixels)


@dataclass(frozen=True)
class _Stored:
    """A decoded picture, upright, with 8 bits per channel, and its colour description."""

    image: Image.Image
    exif: Mapping[int, Any]
    notes: Notes
    numbers: Cicp | None = None


def _stored(data: bytes, limits: Limits, check: Callable[[int, int], None]) -> _Stored:
    """The first picture of a file; `check` gets its size before a pixel is decoded."""
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"at most {limits.max_bytes / 2**20:g} MB are allowed")
    with _failing_in_words(data, limits):
        if tiff.is_tiff(data):
            return _stored_tiff(data, check)
        with Image.open(io.BytesIO(data), formats=_decoders_for(data)) as image:
            check(image.width, image.height)
            image.load()
            exif = exif_of(image)
            turn = exif.get(ExifTags.Base.Orientation, 1)
            notes = _turned(notes_of(image, exif), turn)
            upright = _upright(_plain(image, data), turn)
            return _Stored(upright, exif, notes, colour_numbers(data))


def _stored_tiff(data: bytes, check: Callable[[int, int], None]) -> _Stored:
    found = tiff.opened(data)
    directory = found.directory
    check(*directory.size)
    if tiff.is_read_here(directory):
        image = _upright(tiff.image_of(found.data, directory), directory.orientation)
        return _described_tiff(image, found, data)
    try:
        opened = Image.open(io.BytesIO(found.data), formats=[TiffImagePlugin.TiffImageFile.format])
    except UnidentifiedImageError:
        raise UnsupportedImageError(tiff.describe(directory)) from None
    with opened as image:
        image.info.pop("xmp", None)  # Pillow would rotate the picture by it
        image.load()  # the decoder applies the orientation tag and removes it
        return _described_tiff(image, found, data)


def _described_tiff(image: Image.Image, found: tiff.Found, data: bytes) -> _Stored:
    directory, first = found.directory, found.first
    image.info["iptc"] = directory.iptc or first.iptc
    image.info["xmp"] = directory.xmp or first.xmp
    exif = exif_of(image)
    if first is not directory:
        exif = {**exif_in(data, leave_out=_OF_ONE_DIRECTORY), **exif}
    notes = _turned(notes_of(image, exif), directory.orientation)
    if image.mode.startswith("I"):
        grey = tiff.at_full_scale(image, directory)
        grey.info = image.info
        image = grey
    return _Stored(image, exif, notes)


_OF_ONE_DIRECTORY: Final = (
    ExifTags.Base.Orientation,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
)


def _decoders_for(data: bytes) -> tuple[str, ...]:
    """The decoders that may read a file; HEIC only if the operator has installed its decoder."""
    if not is_heic(data):
        return DECODERS
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return DECODERS
    heic.register()
    heic.check(data)
    return (*DECODERS, "HEIF")


@contextlib.contextmanager
def _failing_in_words(data: bytes, limits: Limits) -> Iterator[None]:
    """Convert any exception of a decoder to an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if _decoders_for(data) != DECODERS:
            raise _damaged(error) from None  # a HEIC whose decoder is installed
        raise UnsupportedImageError(
            name_of(data)
            or "the file is none of PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF, or it is damaged"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(
            f"at most {limits.max_pixels / 1e6:g} megapixels are allowed"
        ) from None
    except Exception as error:  # noqa: BLE001 - see _damaged
        raise _damaged(error) from None


def _damaged(error: Exception) -> CorruptImageError | ImageTooLargeError:
    """The error for a failing decoder.

    For hostile bytes a decoder raises nearly anything (OSError, SyntaxError, struct.error,
    KeyError …), and its message may contain memory addresses: neither may reach the caller.
    """
    if isinstance(error, MemoryError):
        return ImageTooLargeError("it does not fit into memory")
    return CorruptImageError("the file is damaged or incomplete")


def _picture(stored: _Stored) -> Picture:
    alpha = _alpha(stored.image)
    shown = _shown(stored)
    if alpha is not None:
        shown.pixels[alpha == 0] = 255
    return Picture(shown.pixels, alpha, shown.profile, stored.notes, shown.warning)


def _mask(image: Image.Image) -> Pixels:
    alpha = _alpha(image)
    if alpha is None or (alpha == 255).all():
        return np.array(_rgb(image).convert("L"))
    return 255 - alpha


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _turned(notes: Notes, orientation: int) -> Notes:
    """The notes of the upright picture: the densities are swapped if it was stored on its side."""
    if notes.density is None or orientation not in _TURNED_SIDEWAYS:
        return notes
    across, down = notes.density
    return replace(notes, density=(down, across))


_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED_SIDEWAYS: Final = (5, 6, 7, 8)


def _plain(image: Image.Image, data: bytes) -> Image.Image:
    """The picture independent of its decoder: no 16-bit samples, no unused alpha."""
    if getattr(image, "is_animated", False):
        # Animations are decoded with alpha whether or not they use it.
        is_opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
        return image.convert("RGB") if is_opaque else image.copy()  # the file will be closed
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if isinstance(transparent, int):
            grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        grey.info = {name: v for name, v in image.info.items() if name != "transparency"}
        return grey
    if isinstance(transparent, tuple) and is_png(data) and data[_PNG_DEPTH_AT] == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def _alpha(image: Image.Image) -> Pixels | None:
    if not image.has_transparency_data:
        return None
    return np.array(image.convert("RGBA").getchannel("A"))


def _shown(stored: _Stored) -> Shown:
    """The picture as 8-bit RGB that a viewer shows correctly.

    In a PNG, colour codes precede a profile, in other files they follow it; gamma comes last. A
    profile of HDR is understood by the codes in it, because it is made for viewers that show HDR.
    """
    image, info = stored.image, stored.image.info
    profile = colour.usable(info.get("icc_profile"))
    numbers = stored.numbers
    if profile is not None and (numbers is None or not numbers.outrank_profile):
        numbers = colour.hdr_in(profile)
    if numbers is not None:
        return colour.by_cicp(_pixels(image), numbers)
    if profile is None and info.get("gamma") and "srgb" not in info:
        return colour.by_gamma(_pixels(image), info["gamma"], info.get("chromaticity"))
    if image.mode in ("CMYK", "L", "LA"):
        flat = image.convert("L") if image.mode == "LA" else image
        return Shown(_pixels(_shown_in_srgb(flat, profile)))
    if profile is None and is_marked_adobe_rgb(stored.exif):
        profile = colour.adobe_rgb_profile()
    if colour.is_for_results(profile):
        return Shown(_pixels(image), profile)
    return Shown(_pixels(_shown_in_srgb(_rgb(image), profile)))


def _pixels(image: Image.Image) -> Pixels:
    return np.array(_rgb(image))  # a writable copy


def _rgb(image: Image.Image) -> Image.Image:
    # Palettes and transparent colours are expanded first: a direct conversion would warn.
    return (
        image.convert("RGBA").convert("RGB")
        if image.has_transparency_data
        else image.convert("RGB")
    )


# --- masks ---------------------------------------------------------------------------------------


def blend(edited: Picture, source: Picture, mask: Pixels) -> Picture:
    """The edited picture inside the mask (H, W) and the source, bit-exact, outside of it.

    The transition lies inside: nothing changes where the mask is 0. It is shorter if the mask is
    too narrow for it, so that a thin stroke is not lost. Both pictures have the size of the mask;
    the metadata is that of the edited one.
    """
    box = Image.fromarray(mask).getbbox()
    if box is None:
        return replace(edited, pixels=source.pixels)
    left, top, right, bottom = box  # with a margin that includes the mask's edge
    box = max(left - 1, 0), max(top - 1, 0), right + 1, bottom + 1
    part = np.s_[box[1] : box[3], box[0] : box[2]]
    longer_side = max(source.width, source.height)
    width = min(max(round(FEATHER * longer_side), MIN_FEATHER), MAX_FEATHER)
    pixels = source.pixels.copy()
    pixels[part] = Image.composite(
        Image.fromarray(edited.pixels[part]),
        Image.fromarray(source.pixels[part]),
        Image.fromarray(_feathered(mask[part], width)),
    )
    return replace(edited, pixels=pixels)


def changed_share(before: Pixels, after: Pixels) -> float:
    """The share of pixels, from 0 to 1, that are not identical."""
    return float((before != after).any(axis=-1).mean())


def _feathered(mask: Pixels, width: int) -> Pixels:
    """The mask with an edge that falls to 0 within about `width` pixels on its inner side.

    A pixel is weighted by its depth, the sum of the mask eroded by 0, 1, … pixels. A blur removes
    the steps of a hard mask, which the depth repeats; blur beyond the mask is dropped.
    """
    eroded, depth = mask, mask.astype(np.uint16)
    for step in range(1, width):
        eroded = _eroded(eroded, with_corners=step % 2 == 0)
        depth += eroded
    stairs = _weighted(mask, depth, width, width)
    blur = min(_MAX_BLUR, width // 2)
    smooth = np.array(Image.fromarray(stairs).filter(ImageFilter.BoxBlur(blur)))
    return _weighted(mask, smooth.astype(np.uint16), 1, width + blur)


def _weighted(mask: Pixels, depth: npt.NDArray[np.uint16], most: int, distance: int) -> Pixels:
    """The mask times each pixel's share of full depth, which is `most` times its own value.

    If nothing within this distance is that deep, the deepest counts as full: a stroke that is
    narrower than the feather keeps its middle.
    """
    full = np.minimum(mask.astype(np.uint16) * most, _highest_within(depth, distance))
    share = depth / np.maximum(full, 1, dtype=np.float32)
    return np.rint(mask * np.minimum(share, 1)).astype(np.uint8)


def _eroded(mask: Pixels, *, with_corners: bool) -> Pixels:
    """The lowest of each pixel and its neighbours; alternating shapes make edges nearly round.

    Nothing is lower outside the picture: its border is not an edge of the mask.
    """
    lowest: Pixels = mask.copy()
    np.minimum(lowest[1:], mask[:-1], out=lowest[1:])
    np.minimum(lowest[:-1], mask[1:], out=lowest[:-1])
    beside = lowest.copy() if with_corners else mask
    np.minimum(lowest[:, 1:], beside[:, :-1], out=lowest[:, 1:])
    np.minimum(lowest[:, :-1], beside[:, 1:], out=lowest[:, :-1])
    return lowest


def _highest_within(values: npt.NDArray[np.uint16], distance: int) -> npt.NDArray[np.uint16]:
    """The highest value in a square around each pixel that extends this far to each side."""
    for _ in range(2):  # along the columns, then, transposed, along the rows
        window, length = np.pad(values, ((distance, distance), (0, 0))), 1
        while length < 2 * distance + 1:
            step = min(length, 2 * distance + 1 - length)
            window = np.maximum(window[:-step], window[step:])
            length += step
        values = window.T
    return values


# --- encoding ------------------------------------------------------------------------------------


def restore(edited: Pixels, source: Picture) -> Picture:
    """Bring the edit of `source.in_srgb` to the exact size and the profile of the source.

    The metadata is that of the source.
    """
    image = Image.fromarray(np.ascontiguousarray(edited))
    size = (source.width, source.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = colour.in_profile(np.array(image), source.in_srgb, source.pixels, source.icc_profile)
    return replace(source, pixels=pixels)


def enlarged(made: Pixels, source: Picture) -> Picture:
    """The source in the size of `made`, which is its `in_srgb` enlarged, and in its profile."""
    height, width, _ = made.shape
    return restore(made, resized(source, width, height))


def check_encodable(width: int, height: int, suffix: str) -> None:
    """Raise InvalidParameterError if a format cannot hold a picture of this size."""
    output = OUTPUT_FORMATS[suffix.lower()]
    if max(width, height) > output.max_side:
        raise InvalidParameterError(
            f"{output.name} holds at most {output.max_side} pixels per side, "
            f"the picture has {width}×{height}; save it as .png"
        )


def resized(picture: Picture, width: int, height: int) -> Picture:
    """The picture in another size."""

    def to_size(pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels)
        return np.array(image.resize((width, height), Image.Resampling.LANCZOS))

    alpha = None if picture.alpha is None else to_size(picture.alpha)
    return replace(picture, pixels=to_size(picture.pixels), alpha=alpha)


def flattened(picture: Picture) -> Picture:
    """The picture composited on white, if it has transparency."""
    return replace(picture, pixels=np.array(_image(picture, with_alpha=False)), alpha=None)


def encode(
    picture: Picture, suffix: str, record: Record | None = None, quality: int | None = None
) -> bytes:
    """The bytes of a file with this suffix; the same picture and record give the same bytes.

    `quality`, from 0 to 100, applies to JPEG, WebP and AVIF only.

    JPEG and BMP cannot store alpha: the picture is composited on white. BMP stores neither a colour
    profile (the colours are converted to sRGB) nor credit nor the record, only the density.
    """
    output = OUTPUT_FORMATS[suffix.lower()]
    image = _image(picture, with_alpha=output.carries_alpha)
    options = dict(output.options)
    if quality is not None and "quality" in options:
        options["quality"] = quality
    profile = picture.icc_profile
    if profile is not None and len(profile) > output.max_profile_bytes:
        image, profile = _in_srgb(image, profile), None
    options.update(_companions(picture, record, output, profile))
    buffer = io.BytesIO()
    image.save(buffer, output.name, **{name: v for name, v in options.items() if v is not None})
    return buffer.getvalue()


def _companions(
    picture: Picture, record: Record | None, output: OutputFormat, profile: bytes | None
) -> dict[str, Any]:
    """The options that store notes, record and profile in a file, in the way of its format."""
    notes, dpi = picture.notes, picture.notes.density
    if output is BMP:
        return {"dpi": dpi}
    xmp = packet_of(notes.credit, record, notes.source_type)
    has_profile = profile is not None
    if output is PNG:
        # Density and record have their own chunks; if there is EXIF, it needs the density as well.
        exif = exif_with(notes, None, has_profile=has_profile) if notes.exif else None
        chunks = PngImagePlugin.PngInfo()
        if record is not None:
            chunks.add_text(_PNG_SOFTWARE_KEY, record.software)
            chunks.add_itxt(RECORD_KEY, written(record))
        if xmp is not None:
            chunks.add_itxt(_PNG_XMP_KEY, xmp.decode())
        return {"icc_profile": profile, "exif": _bytes(exif), "pnginfo": chunks, "dpi": dpi}
    if output is TIFF:
        exif = exif_with(notes, record, has_profile=has_profile, byte_order="little")
        if xmp is not None:
            exif = Image.Exif() if exif is None else exif
            exif[ExifTags.Base.XMLPacket] = xmp
        return {"icc_profile": profile, "exif": _bytes(exif)}
    exif = exif_with(notes, record, has_profile=has_profile)
    if output is not JPEG:
        return {"icc_profile": profile, "exif": _bytes(exif), "xmp": xmp}
    if exif is not None:
        add_jpeg_tags(exif, picture.width, picture.height)
    return {"icc_profile": profile, "exif": _bytes(exif), "xmp": xmp, "dpi": dpi}


def _bytes(exif: Image.Exif | None) -> bytes | None:
    # Given the object, the TIFF encoder would omit the inner tags.
    return None if exif is None else exif.tobytes()


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The same picture, including transparency, in sRGB."""
    converted = _shown_in_srgb(image.convert("RGB"), profile)
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


def preview(
    picture: Picture, side: int = PREVIEW_SIDE, max_base64_bytes: int = PREVIEW_BASE64_BYTES
) -> bytes:
    """A JPEG of the picture in sRGB, at most `side` pixels, small enough to be shown in a chat."""
    image = _image(picture, with_alpha=False)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image = _shown_in_srgb(image, picture.icc_profile)
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        if len(base64.b64encode(buffer.getvalue())) <= max_base64_bytes:
            return buffer.getvalue()
        side = side * 3 // 4


def _image(picture: Picture, *, with_alpha: bool) -> Image.Image:
    image = Image.fromarray(picture.pixels)
    if picture.alpha is None:
        return image
    alpha = Image.fromarray(picture.alpha)
    if with_alpha:
        image.putalpha(alpha)
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white


def _shown_in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture for a file without a profile."""
    return image if profile is None else colour.to_srgb(image, profile) or image


# --- the record of an edit -----------------------------------------------------------------------


def read_edit_record(source: bytes | Path) -> EditRecord | None:
    """The record of the edit, or None if the picture was not edited here or lost its notes."""
    record = read_record(source)
    return record if isinstance(record, EditRecord) else None


def read_record(source: bytes | Path) -> Record | None:
    """The record of an edit or generation, or None if it was not made here or lost its notes."""
    data = source.read_bytes() if isinstance(source, Path) else source
    try:
        if tiff.is_tiff(data):
            tiff.opened(data)  # refuses values that overlap many times and would fill the memory
        with Image.open(io.BytesIO(data), formats=DECODERS) as image:
            return record_of(image)
    except Exception:  # noqa: BLE001 - notes of others, or none: see _damaged
        return None
