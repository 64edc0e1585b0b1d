"""Pictures keep what must survive an edit, and nothing hostile gets past the header."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from step1x_edit.errors import (
    CorruptImageError,
    ImageAspectError,
    ImageError,
    ImageTooLargeError,
    ImageTooSmallError,
    InvalidParameterError,
    UnsupportedImageError,
)
from step1x_edit.pictures.images import (
    PREVIEW_BASE64_BYTES,
    Picture,
    blend,
    changed_share,
    check_encodable,
    decode,
    decode_mask,
    encode,
    preview,
    read_edit_record,
    restore,
)
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS, OutputFormat
from step1x_edit.schemas.requests import EditRecord
from step1x_edit.settings import Limits

LIMITS = Limits(max_bytes=32 * 2**20, max_pixels=50_000_000)
INPUT_FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"]
WITH_EXIF = ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"]
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RECORD = EditRecord(
    model="demo",
    prompt="add a red hat 🎩 加一顶红帽子\n“please”",
    negative_prompt="blurry",
    num_steps=28,
    guidance_scale=6.0,
    size_level=512,
    seed=2**32 - 1,
)


def photograph(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth shapes with a bright corner at the top left, so that turning shows."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([np.sin(5 * x + y), np.cos(4 * y), x * y], axis=-1) * 60 + 100
    pixels[: height // 3, : width // 4] = (250, 30, 30)
    return Image.fromarray(pixels.astype(np.uint8))


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def exif_with(tags: Mapping[ExifTags.Base, object]) -> Image.Exif:
    exif = Image.Exif()
    exif.update({int(tag): value for tag, value in tags.items()})
    return exif


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(float) - right.astype(float)).mean())


# --- decoding ---


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_every_input_format_is_read(name: str) -> None:
    image = photograph()
    options = {"quality": 95} if name in ("JPEG", "WEBP", "AVIF") else {}
    picture = decode(saved(image, name, **options), LIMITS)
    assert picture.pixels.shape == (64, 96, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.flags.writeable
    assert picture.alpha is None
    assert distance(picture.pixels, np.array(image)) < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", WITH_EXIF)
def test_orientation_is_applied(name: str, orientation: int) -> None:
    upright = photograph()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    tags = {ExifTags.Base.Orientation: orientation}
    options = {"quality": 95} if name in ("JPEG", "WEBP", "AVIF") else {}
    picture = decode(saved(stored, name, exif=exif_with(tags), **options), LIMITS)
    assert (picture.width, picture.height) == upright.size
    assert distance(picture.pixels, np.array(upright)) < 6
    for suffix in (".png", ".jpg", ".tiff", ".avif", ".webp"):
        again = opened(encode(picture, suffix))
        assert again.size == upright.size
        assert again.getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_only_the_first_picture_of_an_animation_is_taken() -> None:
    first, second = Image.new("RGB", (32, 32), RED), Image.new("RGB", (32, 32), BLUE)
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(first, name, save_all=True, append_images=[second])
        assert distance(decode(data, LIMITS).pixels, np.array(first)) < 6


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    picture = decode(saved(Image.fromarray(values), "PNG"), LIMITS)
    assert picture.pixels[0, 0].tolist() == [0, 0, 0]
    assert picture.pixels[0, 32].tolist() == pytest.approx([130] * 3, abs=2)
    assert picture.pixels[0, 63].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (32, 32), WHITE)
    image.paste((0, 0, 0), (0, 0, 16, 32))
    data = saved(image.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    pixels = decode(data, LIMITS).pixels
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].max() < 60
    assert pixels[0, 31].min() > 250


def test_float_pixels_are_refused_with_advice() -> None:
    image = Image.fromarray(np.ones((32, 32), np.float32))
    with pytest.raises(UnsupportedImageError, match="8 or 16 bits"):
        decode(saved(image, "TIFF"), LIMITS)


def test_a_profile_for_other_colours_is_dropped() -> None:
    rgb_profile_on_grey = saved(Image.new("L", (32, 32), 90), "PNG", icc_profile=SRGB)
    assert decode(rgb_profile_on_grey, LIMITS).icc_profile is None


def test_alpha_is_set_aside_and_hidden_colour_becomes_white() -> None:
    image = photograph().convert("RGBA")
    image.paste((0, 255, 0, 0), (40, 40, 51, 64))
    image.paste((0, 255, 0, 128), (51, 40, 64, 64))
    for name in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if name == "WEBP" else {}
        picture = decode(saved(image, name, **options), LIMITS)
        assert picture.alpha is not None
        assert picture.alpha[50, 50] == 0
        assert picture.alpha[50, 51] == 128
        assert picture.alpha[0, 0] == 255
        assert picture.pixels[50, 50].tolist() == [255, 255, 255]
        assert picture.pixels[50, 51].tolist() == [0, 255, 0]


def test_palette_transparency_is_alpha() -> None:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 3), 1)
    picture = decode(saved(image, "GIF", transparency=1), LIMITS)
    assert picture.alpha is not None
    assert picture.alpha[3, 3] == 0
    assert picture.alpha[0, 0] == 255


# --- what is refused ---


@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.9, 0.95])
@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_a_truncated_file_is_an_error(name: str, share: float) -> None:
    data = saved(Image.fromarray(noise(64, 64)), name)
    with pytest.raises((CorruptImageError, UnsupportedImageError)) as caught:
        decode(data[: int(len(data) * share)], LIMITS)
    assert "0x" not in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [7072, 10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(ImageTooLargeError, match=r"^Image too large: .*50 megapixels"):
        decode(png_header(side, side), LIMITS)


def test_a_long_file_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageTooLargeError, match=r"^Image too large: at most 1 MB"):
        decode(b"\0" * 2 * 2**20, Limits(max_bytes=2**20, max_pixels=10))


@pytest.mark.parametrize("size", [(17 * 16, 16), (16, 17 * 16), (10_000, 1)])
def test_an_extreme_aspect_ratio_is_refused_in_words(size: tuple[int, int]) -> None:
    with pytest.raises(ImageAspectError, match=r"^Image too elongated: .*16 times"):
        decode(saved(Image.new("RGB", size), "PNG"), LIMITS)


def test_the_smallest_picture_has_16_pixels_a_side() -> None:
    assert decode(saved(Image.new("RGB", (16, 16)), "PNG"), LIMITS).width == 16
    with pytest.raises(ImageTooSmallError, match="15×16 pixels"):
        decode(saved(Image.new("RGB", (15, 16)), "PNG"), LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"%PDF-1.4",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b'{"detail":"Not Found"}',
        b"P6 32 32 255\n" + bytes(32 * 32 * 3),
    ],
)
def test_what_is_not_on_the_list_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError, match=r"^Unsupported image format: "):
        decode(data, LIMITS)


def test_content_decides_the_format_of_a_phone_picture() -> None:
    data = saved(photograph(), "MPO", save_all=True, append_images=[photograph()])
    assert decode(data, LIMITS).width == 96


def test_damaged_bytes_never_raise_anything_but_image_errors() -> None:
    random = np.random.default_rng(3)
    for name in INPUT_FORMATS:
        sound = saved(photograph(), name)
        for _ in range(40):
            data = bytearray(sound)
            for position in random.integers(0, len(data), 6):
                data[position] = random.integers(0, 256)
            with contextlib.suppress(ImageError):
                decode(bytes(data), LIMITS)


# --- restoring and encoding ---


def test_the_result_has_the_exact_size_of_the_input() -> None:
    source = decode(saved(photograph(97, 61), "PNG"), LIMITS)
    assert restore(noise(768, 480), source).pixels.shape == (61, 97, 3)


def test_restoring_does_not_resample_a_fitting_picture() -> None:
    edited = noise(96, 64)
    source = decode(saved(photograph(96, 64), "PNG"), LIMITS)
    assert np.array_equal(restore(edited, source).pixels, edited)


@pytest.mark.parametrize("suffix", OUTPUT_FORMATS)
def test_every_output_format_shows_the_same_picture(suffix: str) -> None:
    picture = Picture(np.array(photograph()))
    again = opened(encode(picture, suffix))
    assert distance(np.array(again.convert("RGB")), picture.pixels) < 3
    assert again.format == OUTPUT_FORMATS[suffix].name


@pytest.mark.parametrize("suffix", OUTPUT_FORMATS)
def test_equal_pictures_give_equal_bytes(suffix: str) -> None:
    picture = Picture(noise(64, 48), icc_profile=SRGB)
    assert encode(picture, suffix, RECORD) == encode(picture, suffix, RECORD)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".avif", ".tiff"])
def test_alpha_is_kept(suffix: str) -> None:
    image = photograph().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    source = decode(saved(image, "PNG"), LIMITS)
    again = opened(encode(restore(noise(192, 128), source), suffix))
    assert again.mode == "RGBA"
    assert distance(np.array(again.getchannel("A")), np.array(image.getchannel("A"))) < 2


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_without_room_for_alpha_the_picture_is_laid_on_white(suffix: str) -> None:
    picture = Picture(np.zeros((32, 32, 3), np.uint8), alpha=np.zeros((32, 32), np.uint8))
    assert np.array(opened(encode(picture, suffix)).convert("RGB")).min() > 250


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff"])
def test_the_colour_profile_is_kept(suffix: str) -> None:
    source = decode(saved(photograph(), "JPEG", icc_profile=SRGB), LIMITS)
    result = restore(noise(192, 128), source)
    assert opened(encode(result, suffix)).info["icc_profile"] == SRGB


def test_a_damaged_profile_is_not_passed_on() -> None:
    source = decode(saved(photograph(), "PNG", icc_profile=b"no profile" * 20), LIMITS)
    assert source.icc_profile is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff"])
def test_the_place_is_dropped_and_the_camera_is_kept(suffix: str) -> None:
    exif = exif_with({ExifTags.Base.Make: "Leica", ExifTags.Base.ImageDescription: "secret words"})
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (47.0, 22.0, 0.0)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.BodySerialNumber] = "123456"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FNumber] = 2.8
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0secret words"
    source = decode(saved(photograph(), "JPEG", exif=exif, comment=b"secret words"), LIMITS)
    data = encode(source, suffix, RECORD)
    kept = opened(data).getexif()
    assert kept[ExifTags.Base.Make] == "Leica"
    assert float(kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FNumber]) == pytest.approx(2.8)
    assert not kept.get_ifd(ExifTags.IFD.GPSInfo)
    assert ExifTags.Base.BodySerialNumber not in kept.get_ifd(ExifTags.IFD.Exif)
    assert b"secret words" not in data


def test_a_tag_of_unreasonable_length_is_dropped() -> None:
    data = saved(photograph(), "JPEG", exif=exif_with({ExifTags.Base.Artist: "secret" * 500}))
    assert b"secret" not in encode(decode(data, LIMITS), ".jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_unreadable_exif_does_not_spoil_a_picture() -> None:
    data = saved(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode(data, LIMITS).width == 96


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff"])
def test_the_record_of_the_edit_can_be_read_back(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"edited{suffix}"
    file.write_bytes(encode(Picture(noise(32, 32)), suffix, RECORD))
    assert read_edit_record(file) == RECORD


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff"])
def test_the_longest_prompts_fit_into_the_file(suffix: str) -> None:
    texts = {"prompt": "字" * 4000, "negative_prompt": "é" * 4000, "rewritten_prompt": "界" * 4000}
    record = RECORD.model_copy(update={**texts, "thinking": True})
    assert read_edit_record(encode(Picture(noise(32, 32)), suffix, record)) == record


@pytest.mark.parametrize("suffix", OUTPUT_FORMATS)
def test_a_picture_that_comes_as_a_png_is_written_like_the_first_one(suffix: str) -> None:
    """The command line makes other formats of the PNG that a server gives it."""
    exif = exif_with({ExifTags.Base.Make: "Leica", ExifTags.Base.Artist: "Ada"})
    xmp = b"""<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
        xmlns:p="http://ns.adobe.com/photoshop/1.0/"><r:Description p:Credit="dpa"/></r:RDF>"""
    options = {"exif": exif, "xmp": xmp, "dpi": (300, 150), "icc_profile": SRGB}
    source = decode(saved(photograph(), "JPEG", **options), LIMITS)

    travelled = decode(encode(source, ".png", RECORD), LIMITS)

    assert encode(travelled, suffix, RECORD) == encode(source, suffix, RECORD)
    assert travelled.notes.credit.credit == "dpa"
    assert travelled.notes.density == (300, 150)


def test_a_picture_made_elsewhere_has_no_record() -> None:
    assert read_edit_record(saved(photograph(), "JPEG")) is None
    assert read_edit_record(b"no picture") is None


def test_a_record_of_an_input_does_not_leak_into_the_next_result() -> None:
    source = decode(encode(Picture(noise(32, 32)), ".jpg", RECORD), LIMITS)
    assert read_edit_record(encode(source, ".jpg")) is None


def test_a_format_that_cannot_hold_the_picture_is_refused_beforehand() -> None:
    long = Picture(np.zeros((2, 16_384, 3), np.uint8))
    check_encodable(long.width, long.height, ".png")
    with pytest.raises(InvalidParameterError, match="16383 pixels per side"):
        check_encodable(long.width, long.height, ".webp")


@pytest.mark.parametrize("size", [(2000, 1500), (512, 512), (90, 60)])
def test_the_preview_stays_small(size: tuple[int, int]) -> None:
    data = preview(Picture(noise(*size)))
    image = opened(data)
    assert image.format == "JPEG"
    assert max(image.size) <= min(512, max(size))
    assert len(base64.b64encode(data)) <= PREVIEW_BASE64_BYTES


def test_the_preview_shows_the_colours_that_the_profile_means() -> None:
    swapped = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    red_is_blue = re.sub(rb"[rb]XYZ", lambda tag: swapped[tag[0]], SRGB)
    picture = Picture(np.full((32, 32, 3), RED, np.uint8), icc_profile=red_is_blue)

    shown = opened(preview(picture)).getpixel((16, 16))

    assert isinstance(shown, tuple)
    assert np.allclose(shown, BLUE, atol=20)


@pytest.mark.parametrize("output", OUTPUT_FORMATS.values())
def test_each_format_has_its_media_type(output: OutputFormat) -> None:
    assert output.media_type == Image.MIME[output.name]


# --- masks ---


def half(mode: str, left: object, right: object) -> Image.Image:
    """A mask of 48×32 pixels whose halves are of one colour each."""
    image = Image.new(mode, (48, 32), left)  # type: ignore[arg-type]
    image.paste(right, (24, 0, 48, 32))  # type: ignore[arg-type]
    return image


@pytest.mark.parametrize(
    "mask",
    [
        half("L", 0, 255),
        half("1", 0, 1),
        half("RGB", (0, 0, 0), WHITE),
        half("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)),  # says nothing by its transparency
        half("RGBA", (255, 255, 255, 255), (0, 0, 0, 0)),  # transparent may change, as with OpenAI
        half("LA", (255, 255), (255, 0)),
        half("I;16", 0, 65535),
        half("RGB", (0, 0, 0), WHITE).convert("P"),
        half("RGBA", (9, 9, 9, 255), (9, 9, 9, 0)).convert("P"),
    ],
    ids=lambda mask: mask.mode,
)
def test_what_is_white_or_transparent_in_a_mask_may_change(mask: Image.Image) -> None:
    found = decode_mask(saved(mask, "PNG"), LIMITS, (48, 32))
    assert (found.shape, found.dtype) == ((32, 48), np.dtype(np.uint8))
    assert (found[:, :24] == 0).all()
    assert (found[:, 24:] == 255).all()


def test_grey_and_half_transparent_lie_between() -> None:
    assert decode_mask(saved(half("L", 0, 100), "PNG"), LIMITS, (48, 32))[0, -1] == 100
    translucent = half("RGBA", (0, 0, 0, 255), (0, 0, 0, 155))
    assert decode_mask(saved(translucent, "PNG"), LIMITS, (48, 32))[0, -1] == 100


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_a_mask_may_have_any_input_format(name: str) -> None:
    found = decode_mask(saved(half("L", 0, 255).convert("RGB"), name), LIMITS, (48, 32))
    assert distance(found, np.array(half("L", 0, 255))) < 3


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF"])
def test_a_mask_is_turned_as_its_picture_is(name: str) -> None:
    exif = exif_with({ExifTags.Base.Orientation: 6})
    lying = saved(half("L", 0, 255), name, exif=exif)
    picture = decode(saved(photograph(48, 32), name, exif=exif), LIMITS)
    found = decode_mask(lying, LIMITS, (picture.width, picture.height))
    assert found.shape == (48, 32)
    assert found[:20].max() < 16
    assert found[28:].min() > 239
    with pytest.raises(InvalidParameterError, match="mask is 32×48 pixels, the picture is 48×32"):
        decode_mask(lying, LIMITS, (48, 32))


@pytest.mark.parametrize(
    ("data", "kind", "sentence"),
    [
        (b"no picture", UnsupportedImageError, "Unsupported image format: the file is none of"),
        (saved(half("L", 0, 255), "PNG")[:-35], CorruptImageError, "Cannot read image: the file"),
        (b"x" * 20_001, ImageTooLargeError, "Image too large: at most"),
        (
            saved(Image.new("1", (2000, 1000)), "PNG"),
            ImageTooLargeError,
            "Image too large: 2000×10",
        ),
        (
            saved(half("F", 0.0, 1.0), "TIFF"),
            UnsupportedImageError,
            "Unsupported image format: flo",
        ),
        (
            saved(Image.new("L", (8, 300), "white"), "PNG"),
            InvalidParameterError,
            "Invalid parameter: mask is 8×300 pixels, the picture is 48×32; both must have the sam",
        ),
        (
            saved(half("L", 0, 0), "PNG"),
            InvalidParameterError,
            "Invalid parameter: mask selects nothing; make what may change white, or transparent",
        ),
    ],
    ids=["text", "cut", "heavy", "large", "float", "other size", "black"],
)
def test_a_mask_that_cannot_be_used_is_refused(data: bytes, kind: type, sentence: str) -> None:
    with pytest.raises(kind) as caught:
        decode_mask(data, Limits(max_bytes=20_000, max_pixels=1_000_000), (48, 32))
    assert str(caught.value).startswith(sentence)


def disc(width: int, height: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.where(np.hypot(x - width // 2, y - height // 2) <= radius, 255, 0).astype(np.uint8)


def blended(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A source, an edit that differs in every number, and the two blended."""
    height, width = mask.shape
    source = Picture(noise(width, height), alpha=None, icc_profile=SRGB)
    edited = Picture(source.pixels + np.uint8(100), icc_profile=SRGB)
    before = source.pixels.copy()
    result = blend(edited, source, mask)
    assert result.icc_profile == SRGB
    assert np.array_equal(source.pixels, before)
    return before, edited.pixels, result.pixels


@pytest.mark.parametrize("size", [(40, 30), (640, 300), (2000, 1000)])
def test_outside_of_a_mask_nothing_changes_and_deep_inside_all_does(size: tuple[int, int]) -> None:
    radius = 0.4 * min(size)
    mask = disc(*size, radius)
    before, edited, after = blended(mask)
    assert np.array_equal(after[mask == 0], before[mask == 0])
    core = disc(*size, radius - max(2.0, 0.011 * max(size)) - 4) > 0
    assert np.array_equal(after[core], edited[core])
    assert (after[mask > 0] != before[mask > 0]).any(axis=-1).all()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_mask_is_nothing_changes_where_it_is_0(seed: int) -> None:
    random = np.random.default_rng(seed)
    grey = random.integers(1, 256, (60, 90), dtype=np.uint8)
    mask = np.where(random.random((60, 90)) < random.random(), grey, 0).astype(np.uint8)
    before, _, after = blended(mask)
    assert np.array_equal(after[mask == 0], before[mask == 0])
    assert changed_share(before, after) <= np.count_nonzero(mask) / mask.size


def test_the_way_from_old_to_new_has_no_step() -> None:
    mask = disc(800, 800, 300)
    black, white = np.zeros((800, 800, 3), np.uint8), np.full((800, 800, 3), 255, np.uint8)
    row = blend(Picture(white), Picture(black), mask).pixels[400, :, 0].astype(int)
    assert (row[0], row[400], row[799]) == (0, 255, 0)
    assert np.abs(np.diff(row)).max() <= 255 / 6
    assert 7 <= np.count_nonzero((row > 0) & (row < 255)) / 2 <= 12


def test_the_stairs_of_a_slanting_edge_are_smoothed() -> None:
    y, x = np.mgrid[0:400, 0:800]
    mask = np.where(y > 100 + x // 8, 255, 0).astype(np.uint8)  # steps of 8 pixels
    black, white = np.zeros((400, 800, 3), np.uint8), np.full((400, 800, 3), 255, np.uint8)
    after = blend(Picture(white), Picture(black), mask).pixels[:, :, 0].astype(int)
    along = after[156, 300:420]  # from outside, through the feather, to deep inside
    assert np.abs(np.diff(along)).max() <= 255 / 20


def test_the_border_of_the_picture_is_no_edge_of_a_mask() -> None:
    mask = np.array(half("L", 0, 255).resize((480, 320), Image.Resampling.NEAREST))
    before, edited, after = blended(mask)
    assert np.array_equal(after[:, 250:], edited[:, 250:])
    assert np.array_equal(after[:, :240], before[:, :240])
    everywhere = np.full((32, 48), 255, np.uint8)
    _, edited, after = blended(everywhere)
    assert np.array_equal(after, edited)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_stroke_narrower_than_the_feather_is_still_edited_in_its_middle(width: int) -> None:
    mask = np.zeros((600, 800), np.uint8)
    mask[100 : 100 + width, 50:700] = 255
    before, edited, after = blended(mask)
    middle = 100 + width // 2
    assert np.array_equal(after[middle, 100:600], edited[middle, 100:600])
    assert np.array_equal(after[mask == 0], before[mask == 0])


def test_grey_in_a_mask_goes_a_part_of_the_way() -> None:
    mask = np.full((300, 400), 102, np.uint8)
    mask[:, 200:] = 255
    black, white = np.zeros((300, 400, 3), np.uint8), np.full((300, 400, 3), 255, np.uint8)
    after = blend(Picture(white), Picture(black), mask).pixels
    assert (after[:, :200] == 102).all()
    assert (after[:, 210:] == 255).all()


def test_the_share_that_changed_counts_pixels_and_not_channels() -> None:
    before = np.zeros((10, 20, 3), np.uint8)
    after = before.copy()
    after[0, 0], after[0, 1, 2], after[5, :, 0] = 9, 1, 255
    assert changed_share(before, before) == 0.0
    assert changed_share(before, after) == 22 / 200
    assert changed_share(before, before + np.uint8(1)) == 1.0


def test_the_record_names_a_mask_only_where_there_was_one() -> None:
    named = RECORD.model_copy(update={"mask_sha256": "0f" * 32})
    picture = Picture(noise(16, 16))
    assert read_edit_record(encode(picture, ".png", named)) == named
    assert read_edit_record(encode(picture, ".jpg", named)) == named
    assert b"mask" not in encode(picture, ".png", RECORD)
