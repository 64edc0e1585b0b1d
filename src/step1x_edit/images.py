"""Pictures: bytes to upright RGB and back to bytes, with what must survive an edit.

Limits are checked on the header, before a pixel is decoded; the decoders are an explicit list, and
content decides the format, not the name. The network sees 8-bit RGB as a viewer shows it:

- EXIF orientation is applied, of animations and stacks only the first picture is taken;
- 16-bit grey is scaled, palettes are expanded, CMYK and grey with a profile are converted to sRGB;
- an RGB colour profile stays with the picture and the numbers stay as they are;
- alpha is set aside; colours hidden under full transparency become white.

This module knows nothing about paths, folders and the model.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
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
from step1x_edit.schemas import EditRecord

Pixels = npt.NDArray[np.uint8]

# Pillow finds a decoder by name only once its module is imported.
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

FEATHER: Final = 0.01  # of the longer side: how far inside a mask its edge is soft
MIN_FEATHER: Final = 2  # pixels
MAX_FEATHER: Final = 64  # pixels; each of them is one more pass over the masked part

PREVIEW_SIDE: Final = 512
PREVIEW_BASE64_BYTES: Final = 96 * 1024  # what a chat host shows without cutting

_MAX_BLUR: Final = 3  # pixels; the stairs of a hard mask are one pixel high
_MAX_PROFILE_LENGTH: Final = 2**20  # what PNG decoders are willing to read
_RECORD_KEY: Final = "step1x-edit"


@dataclass(frozen=True)
class Limits:
    """How large a picture may be."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class Picture:
    """An upright picture and what travels with it."""

    pixels: Pixels  # (H, W, 3)
    alpha: Pixels | None = None  # (H, W)
    icc_profile: bytes | None = None
    exif: Mapping[int, Any] = field(default_factory=dict)
    """Harmless tags by number: who, when, with which camera; never where."""

    @property
    def width(self) -> int:
        """Width in pixels, upright."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in pixels, upright."""
        return int(self.pixels.shape[0])


# --- decoding ------------------------------------------------------------------------------------


def decode(data: bytes, limits: Limits) -> Picture:
    """Read a picture; raises an ImageError that says what is wrong with it."""
    with _opened(data, limits) as image:
        _check_shape(image.width, image.height)
        image.load()
        return _picture(image)


def decode_mask(data: bytes, limits: Limits, size: tuple[int, int]) -> Pixels:
    """How far each pixel may change, from 0 (it stays) to 255, as (H, W).

    A picture with transparency says so by it: what is fully transparent may change. Any other says
    so by its brightness: what is white may change. Raises an ImageError as `decode` does, and
    InvalidParameterError if the upright mask has not the size (width, height) of the upright
    picture, or lets nothing change.
    """
    with _opened(data, limits) as image:
        image.load()
        image = _upright(image, _exif(image))
        alpha = _alpha(image)
        if alpha is None or (alpha == 255).all():
            mask = np.array(_to_rgb(image, None)[0].convert("L"))
        else:
            mask = 255 - alpha
    height, width = mask.shape
    if (width, height) != size:
        raise InvalidParameterError(
            f"mask is {width}×{height} pixels, the picture is {size[0]}×{size[1]}; "
            "both must have the same size",
            param="mask",
        )
    if not mask.any():
        raise InvalidParameterError(
            "mask selects nothing; make white, or transparent, what may change",
            param="mask",
        )
    return mask


@contextlib.contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """An image whose header is within the limits; whatever its decoder raises is an ImageError."""
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"at most {limits.max_bytes / 2**20:g} MB are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=DECODERS) as image:
            _check_pixels(image.width, image.height, limits)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise UnsupportedImageError(
            "the file is none of PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF, or it is damaged"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(
            f"at most {limits.max_pixels / 1e6:g} megapixels are allowed"
        ) from None
    except Exception as error:  # noqa: BLE001 - see _damaged
        raise _damaged(error) from None


def _damaged(error: Exception) -> CorruptImageError | ImageTooLargeError:
    """What a failing decoder means.

    A decoder that meets hostile bytes raises nearly anything (OSError, SyntaxError, struct.error,
    KeyError …), and its words may hold memory addresses: neither is for the caller.
    """
    if isinstance(error, MemoryError):
        return ImageTooLargeError("it does not fit into memory")
    return CorruptImageError("the file is damaged or incomplete")


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise what `decode` would say of a picture of this size."""
    _check_pixels(width, height, limits)
    _check_shape(width, height)


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


def _picture(image: Image.Image) -> Picture:
    exif = _exif(image)
    profile = _usable(image.info.get("icc_profile"))
    image = _upright(image, exif)
    alpha = _alpha(image)
    image, profile = _to_rgb(image, profile)
    pixels = np.array(image)  # a copy that may be written to
    if alpha is not None:
        pixels[alpha == 0] = 255
    return Picture(pixels, alpha, profile, _harmless(exif))


def _upright(image: Image.Image, exif: Mapping[int, Any]) -> Image.Image:
    turn = _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


# The TIFF decoder of Pillow turns the picture itself and takes the tag away.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _alpha(image: Image.Image) -> Pixels | None:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return None  # 16-bit grey cannot be made RGBA; a transparent shade of it is very rare
    return np.array(image.convert("RGBA").getchannel("A"))


def _to_rgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bytes | None]:
    """The picture as 8-bit RGB and the profile that belongs to these numbers."""
    match image.mode:
        case "I" | "I;16" | "I;16L" | "I;16B" | "I;16N":
            return _from_16_bit(image).convert("RGB"), None
        case "F":
            raise UnsupportedImageError("floating-point pixels; save it with 8 or 16 bits")
        case "LAB":
            raise UnsupportedImageError("Lab colours; save it as RGB")
        case "CMYK" | "L" | "LA" if profile is not None:
            flat = image.convert("L") if image.mode == "LA" else image
            return _to_srgb(flat, profile) or image.convert("RGB"), None
        case "RGB" | "RGBA" | "RGBX" | "P" | "PA" | "YCbCr" if _space(profile) == b"RGB ":
            return _drop_alpha(image), profile
    return _drop_alpha(image), None


def _drop_alpha(image: Image.Image) -> Image.Image:
    # Palettes and transparent colours are expanded first: a plain conversion would warn.
    return (
        image.convert("RGBA").convert("RGB")
        if image.has_transparency_data
        else image.convert("RGB")
    )


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UnsupportedImageError("pixels of 32 bits; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert by the profile; None if the profile is not usable for this picture."""
    try:
        return ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _usable(profile: bytes | None) -> bytes | None:
    """The profile if it is one; a damaged one would only hurt whoever opens the result."""
    if not profile or len(profile) > _MAX_PROFILE_LENGTH:
        return None
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return profile


def _space(profile: bytes | None) -> bytes:
    """The colour space that a profile describes: bytes 16 to 20 of its header."""
    return b"" if profile is None else profile[16:20]


# --- EXIF ----------------------------------------------------------------------------------------

_IMAGE_TAGS: Final = (
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
_PHOTO_TAGS: Final = (
    ExifTags.Base.DateTimeOriginal,
    ExifTags.Base.OffsetTimeOriginal,
    ExifTags.Base.ExposureTime,
    ExifTags.Base.FNumber,
    ExifTags.Base.ISOSpeedRatings,
    ExifTags.Base.FocalLength,
    ExifTags.Base.FocalLengthIn35mmFilm,
    ExifTags.Base.LensModel,
)
_MAX_TAG_LENGTH: Final = 200


def _exif(image: Image.Image) -> dict[int, Any]:
    """All readable tags of the picture; damaged EXIF counts as none."""
    try:
        exif = image.getexif()
        return {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    except Exception:  # noqa: BLE001 - the picture is fine, its notes are not: see _damaged
        return {}


def _harmless(exif: Mapping[int, Any]) -> dict[int, Any]:
    """The tags that may go into the result: an allow-list, so neither place nor serial number."""
    return {
        int(tag): exif[tag]
        for tag in (*_IMAGE_TAGS, *_PHOTO_TAGS)
        if tag in exif and _is_writable(tag, exif[tag])
    }


def _is_writable(tag: int, value: Any) -> bool:
    """Whether the tag can be written back: found out now, not when the edited picture is saved."""
    exif = Image.Exif()
    exif[tag] = value
    try:
        return len(exif.tobytes()) <= _MAX_TAG_LENGTH
    except Exception:  # noqa: BLE001 - see _damaged
        return False


# --- masks ---------------------------------------------------------------------------------------


def blend(edited: Picture, source: Picture, mask: Pixels) -> Picture:
    """The edited picture inside of the mask (H, W) and the source, to the bit, outside of it.

    The way from the one to the other lies inside: nothing changes where the mask is 0. It is
    shorter where the mask is too narrow for it, so that a thin stroke is not lost. Both pictures
    have the size of the mask; what travels with the pixels is that of the edited one.
    """
    box = Image.fromarray(mask).getbbox()
    if box is None:
        return replace(edited, pixels=source.pixels)
    left, top, right, bottom = box  # with a margin, so that the mask's edge is seen
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
    """The share of pixels, from 0 to 1, that are not exactly the same."""
    return float((before != after).any(axis=-1).mean())


def _feathered(mask: Pixels, width: int) -> Pixels:
    """The mask with an edge that falls to 0 within about `width` pixels on its inner side.

    Each pixel counts by its depth, the sum of the mask eroded by 0, 1, … pixels. A blur takes out
    the stairs of a hard mask, which depth repeats; what it carries beyond the mask is dropped.
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
    """The mask times the part of full depth, `most` times its own value, that each pixel has.

    Where nothing within this distance is so deep, the deepest counts as full: a stroke that is
    narrower than the feather keeps its middle.
    """
    full = np.minimum(mask.astype(np.uint16) * most, _highest_within(depth, distance))
    share = depth / np.maximum(full, 1, dtype=np.float32)
    return np.rint(mask * np.minimum(share, 1)).astype(np.uint8)


def _eroded(mask: Pixels, *, with_corners: bool) -> Pixels:
    """The lowest of each pixel and its neighbours; alternating, corners make edges nearly round.

    Beyond the picture nothing is lower: its border is no edge of the mask.
    """
    lowest: Pixels = mask.copy()
    np.minimum(lowest[1:], mask[:-1], out=lowest[1:])
    np.minimum(lowest[:-1], mask[1:], out=lowest[:-1])
    beside = lowest.copy() if with_corners else mask
    np.minimum(lowest[:, 1:], beside[:, :-1], out=lowest[:, 1:])
    np.minimum(lowest[:, :-1], beside[:, 1:], out=lowest[:, :-1])
    return lowest


def _highest_within(values: npt.NDArray[np.uint16], distance: int) -> npt.NDArray[np.uint16]:
    """The highest value in a square around each pixel that reaches this far to each side."""
    for _ in range(2):  # down the columns, then, turned over, along the rows
        window, length = np.pad(values, ((distance, distance), (0, 0))), 1
        while length < 2 * distance + 1:
            step = min(length, 2 * distance + 1 - length)
            window = np.maximum(window[:-step], window[step:])
            length += step
        values = window.T
    return values


# --- encoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFormat:
    """How a picture is written; every option is fixed so that equal pixels give equal bytes."""

    name: str
    media_type: str
    carries_alpha: bool
    max_side: int = 65_500
    options: Mapping[str, Any] = field(default_factory=dict)


_PNG: Final = OutputFormat("PNG", "image/png", carries_alpha=True, options={"compress_level": 6})
_JPEG: Final = OutputFormat(
    "JPEG", "image/jpeg", carries_alpha=False, options={"quality": 95, "subsampling": 0}
)
_WEBP: Final = OutputFormat(
    "WEBP",
    "image/webp",
    carries_alpha=True,
    max_side=16_383,
    options={"quality": 95, "method": 4},
)
_AVIF: Final = OutputFormat(
    "AVIF",
    "image/avif",
    carries_alpha=True,
    options={"quality": 90, "speed": 8, "max_threads": 1},
)
# Uncompressed: LZW hardly shrinks a photograph, and with it Pillow loses the photographic EXIF.
_TIFF: Final = OutputFormat("TIFF", "image/tiff", carries_alpha=True)
_BMP: Final = OutputFormat("BMP", "image/bmp", carries_alpha=False)

OUTPUT_FORMATS: Final[Mapping[str, OutputFormat]] = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _WEBP,
    ".avif": _AVIF,
    ".tiff": _TIFF,
    ".tif": _TIFF,
    ".bmp": _BMP,
}
"""The formats that we write, by suffix in lower case."""


def restore(edited: Pixels, source: Picture) -> Picture:
    """Bring an edited picture to the exact size of its source, with the source's companions."""
    image = Image.fromarray(np.ascontiguousarray(edited))
    size = (source.width, source.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Picture(np.array(image), source.alpha, source.icc_profile, source.exif)


def check_encodable(picture: Picture, suffix: str) -> None:
    """Raise InvalidParameterError if a format cannot hold a picture of this size."""
    output = OUTPUT_FORMATS[suffix.lower()]
    if max(picture.width, picture.height) > output.max_side:
        raise InvalidParameterError(
            f"{output.name} holds at most {output.max_side} pixels per side, "
            f"the picture has {picture.width}×{picture.height}; save it as .png"
        )


def resized(picture: Picture, width: int, height: int) -> Picture:
    """The picture in another size."""

    def to_size(pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels)
        return np.array(image.resize((width, height), Image.Resampling.LANCZOS))

    alpha = None if picture.alpha is None else to_size(picture.alpha)
    return replace(picture, pixels=to_size(picture.pixels), alpha=alpha)


def flattened(picture: Picture) -> Picture:
    """The picture laid on white, where one sees through it."""
    return replace(picture, pixels=np.array(_image(picture, with_alpha=False)), alpha=None)


def encode(
    picture: Picture, suffix: str, record: EditRecord | None = None, quality: int | None = None
) -> bytes:
    """The bytes of a file with this suffix; the same picture and record give the same bytes.

    `quality`, from 0 to 100, means something to JPEG, WebP and AVIF only.

    JPEG and BMP cannot carry alpha: the picture is laid on white. BMP carries neither a colour
    profile (the colours are converted to sRGB) nor EXIF nor the record.
    """
    output = OUTPUT_FORMATS[suffix.lower()]
    image = _image(picture, with_alpha=output.carries_alpha)
    options = dict(output.options)
    if quality is not None and "quality" in options:
        options["quality"] = quality
    if output is _BMP:
        image = _shown_in_srgb(image, picture.icc_profile)
    else:
        options["icc_profile"] = picture.icc_profile
        options["exif"] = _exif_of(picture, None if output is _PNG else record)
    if output is _PNG and record is not None:
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(_RECORD_KEY, _written(record))
        options["pnginfo"] = chunks
    buffer = io.BytesIO()
    image.save(buffer, output.name, **{name: v for name, v in options.items() if v is not None})
    return buffer.getvalue()


def preview(picture: Picture, side: int = PREVIEW_SIDE) -> bytes:
    """A JPEG of the picture in sRGB, `side` pixels or less, short enough to be shown in a chat."""
    image = _image(picture, with_alpha=False)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image = _shown_in_srgb(image, picture.icc_profile)
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        if len(base64.b64encode(buffer.getvalue())) <= PREVIEW_BASE64_BYTES:
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
    """The picture for a file that will carry no profile."""
    return image if profile is None else _to_srgb(image, profile) or image


def _exif_of(picture: Picture, record: EditRecord | None) -> bytes | None:
    exif = Image.Exif()
    for tag, value in picture.exif.items():
        (exif if tag in _IMAGE_TAGS else exif.get_ifd(ExifTags.IFD.Exif))[tag] = value
    if record is not None:
        exif[ExifTags.Base.Software] = record.software
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _comment(record)
    if not exif and not exif.get_ifd(ExifTags.IFD.Exif):
        return None
    return exif.tobytes()  # given the object, the TIFF encoder would leave the inner tags out


# --- the record of an edit -----------------------------------------------------------------------
# PNG: an international text chunk. The others: the EXIF comment, which starts with the name of its
# character set; UTF-16 in big-endian order is what other programs write and expect there.

_UNICODE: Final = b"UNICODE\0"


def _written(record: EditRecord) -> str:
    return record.model_dump_json(exclude_none=True)


def _comment(record: EditRecord) -> bytes:
    return _UNICODE + _written(record).encode("utf-16-be")


def read_edit_record(source: bytes | Path) -> EditRecord | None:
    """What the picture was made with, or None if it was not made here or lost its notes."""
    data = source.read_bytes() if isinstance(source, Path) else source
    try:
        with Image.open(io.BytesIO(data), formats=DECODERS) as image:
            text = image.info.get(_RECORD_KEY) or _commented(_exif(image))
            return EditRecord.model_validate_json(text)
    except Exception:  # noqa: BLE001 - notes of others, or none: see _damaged
        return None


def _commented(exif: Mapping[int, Any]) -> str:
    comment = exif.get(ExifTags.Base.UserComment, b"")
    return bytes(comment).removeprefix(_UNICODE).decode("utf-16-be")
