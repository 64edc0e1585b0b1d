"""The colours of an edit: what the network is given, and what becomes of it in another profile."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastmcp import Client
from fastmcp.client.client import CallToolResult
from mcp_types import ImageContent
from PIL import ExifTags, Image, ImageCms

from conftest import MakeService
from fakes import FakeWorker, canvas
from http_server import TOKEN, serving
from mcp_answers import answer_of
from picture_files import (
    ADOBE_RGB,
    D50,
    D65,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    Floats,
    Pixels,
    cicp,
    difference,
    encoded,
    grey_profile,
    in_primaries,
    levels,
    linear,
    png,
    rgb_profile,
    scene,
    seen,
    table_profile,
    to_pcs,
    with_nclx,
)
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.mcp.server import build_mcp

SCENE = scene()

Space = tuple[tuple[tuple[float, float], ...], float | None, tuple[float, float]]
SPACES: dict[str, Space] = {
    "Display P3": (DISPLAY_P3, None, D65),
    "Adobe RGB": (ADOBE_RGB, 2.2, D65),
    "ProPhoto": (PROPHOTO, 1.8, D50),
}
PROFILES = {
    **{name: rgb_profile(*space) for name, space in SPACES.items()},
    "tables": table_profile(b"A2B0", b"B2A0"),
}
VARIANTS_OF_SRGB = {
    "none": None,
    "ImageCms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "parametric": rgb_profile(SRGB),
    "rounded primaries": rgb_profile(((0.6401, 0.3298), (0.3002, 0.6001), (0.1499, 0.0602))),
}


class Network(FakeWorker):
    """A worker that keeps what it was given, and answers with an exact edit of it."""

    def __init__(self, edit: Callable[[Pixels], Pixels]) -> None:
        super().__init__(paint=self._paint, model="v1.2", version="v1.2")
        self.given: list[Pixels] = []
        self._exact = edit

    def _paint(self, job: EditJob) -> Pixels:
        self.given.append(canvas(job))
        return self._exact(canvas(job))


def grey(pixels: Pixels) -> Pixels:
    return np.repeat(np.array(Image.fromarray(pixels).convert("L"))[:, :, None], 3, axis=2)


def darker(pixels: Pixels) -> Pixels:
    """With half the light."""
    return levels(encoded(linear(pixels) / 2))


def unchanged(pixels: Pixels) -> Pixels:
    return pixels


Call = Callable[..., Any]


@pytest.fixture
def edited(make_service: MakeService, tmp_path: Path) -> Call:
    """Edit a file over MCP; returns the file of the result and the whole answer."""

    async def edit(
        network: Network, data: bytes, mask: bytes | None = None, **more: object
    ) -> tuple[Path, CallToolResult]:
        (tmp_path / "in.x").write_bytes(data)
        asked = {"image_path": str(tmp_path / "in.x"), "output_path": str(tmp_path / "out.png")}
        if mask is not None:
            (tmp_path / "mask.x").write_bytes(mask)
            asked["mask_path"] = str(tmp_path / "mask.x")
        async with Client(build_mcp(make_service(network))) as client:
            answer = await client.call_tool(
                "edit_image", {**asked, "prompt": "x", "overwrite": True, **more}
            )
        return tmp_path / "out.png", answer

    return edit


def saved(pixels: Pixels, name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def stored(path: Path) -> tuple[Pixels, bytes | None]:
    """The numbers in a file, and its profile."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB")), image.info.get("icc_profile")


def all_colours() -> Pixels:
    """Numbers from all over a space: in a wide one, half of these colours lie outside sRGB."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(64, 64, 3)


def chroma(pixels: Pixels) -> float:
    """The mean of what is left of colour, in levels."""
    return float(np.ptp(pixels.astype(int), axis=-1).mean())


def numbers_of(srgb: Pixels, name: str) -> Pixels:
    """The numbers of a picture in a space, by the published definitions alone."""
    primaries, gamma, white = SPACES[name]
    matrix = np.linalg.inv(to_pcs(primaries, white)) @ to_pcs(SRGB)
    return levels(curved((linear(srgb) @ matrix.T).clip(0, 1), gamma))


def curved(light: Floats, gamma: float | None) -> Floats:
    return encoded(light) if gamma is None else light.clip(0, 1) ** (1 / gamma)


def straightened(numbers: Pixels, gamma: float | None) -> Floats:
    return linear(numbers) if gamma is None else (numbers / 255) ** gamma


# --- to the network ---


@pytest.mark.parametrize("name", SPACES)
async def test_the_network_sees_the_srgb_of_a_profile(edited: Call, name: str) -> None:
    network = Network(unchanged)
    await edited(network, saved(numbers_of(SCENE, name), icc_profile=PROFILES[name]))
    assert difference(network.given[0], SCENE) < 1


async def test_the_network_sees_the_srgb_of_a_profile_of_tables(edited: Call) -> None:
    network = Network(unchanged)
    data = saved(numbers_of(SCENE, "Adobe RGB"), icc_profile=PROFILES["tables"])
    await edited(network, data)
    assert difference(network.given[0], SCENE) < 1


P3 = levels(encoded(in_primaries(SCENE, DISPLAY_P3)))
P3_CHUNK = b"".join(
    round(value * 100_000).to_bytes(4, "big") for point in (D65, *DISPLAY_P3) for value in point
)
MARKED = Image.Exif()
MARKED.get_ifd(ExifTags.IFD.Exif).update(
    {
        ExifTags.Base.ColorSpace: 0xFFFF,
        ExifTags.IFD.Interop: {ExifTags.Interop.InteropIndex: "R03"},
    }
)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (png(P3, cicp(12, 13)), 1),
        (png(P3, (b"gAMA", (45_455).to_bytes(4, "big")), (b"cHRM", P3_CHUNK)), 1),
        (with_nclx(saved(P3, "AVIF", quality=95, subsampling="4:4:4", speed=10), 12, 13), 3),
        (saved(numbers_of(SCENE, "Adobe RGB"), "JPEG", quality=95, exif=MARKED), 3),
    ],
    ids=["cICP", "gAMA and cHRM", "nclx", "EXIF"],
)
async def test_the_network_sees_the_srgb_of_colours_stated_in_another_way(
    edited: Call, data: bytes, tolerance: float
) -> None:
    network = Network(grey)
    path, _ = await edited(network, data)
    assert difference(network.given[0], SCENE) < tolerance
    assert stored(path)[1] is not None
    assert chroma(seen(path)) < 0.1


@pytest.mark.parametrize("profile", VARIANTS_OF_SRGB.values(), ids=VARIANTS_OF_SRGB)
async def test_not_a_bit_of_a_picture_in_srgb_is_converted(
    edited: Call, profile: bytes | None
) -> None:
    network = Network(darker)
    path, _ = await edited(network, saved(all_colours(), icc_profile=profile))
    assert np.array_equal(network.given[0], all_colours())
    numbers, kept = stored(path)
    assert np.array_equal(numbers, darker(all_colours()))
    assert kept == profile


# --- and back ---


@pytest.mark.parametrize("name", PROFILES)
async def test_black_and_white_is_neutral_and_that_of_srgb(edited: Call, name: str) -> None:
    space = "Adobe RGB" if name == "tables" else name
    data = saved(numbers_of(SCENE, space), icc_profile=PROFILES[name])
    path, _ = await edited(Network(grey), data)
    assert stored(path)[1] == PROFILES[name]
    assert chroma(seen(path)) < 0.1
    assert difference(seen(path), grey(SCENE)) < 1


@pytest.mark.parametrize("name", PROFILES)
async def test_black_and_white_leaves_nothing_of_colours_outside_srgb(
    edited: Call, name: str
) -> None:
    path, _ = await edited(Network(grey), saved(all_colours(), icc_profile=PROFILES[name]))
    assert chroma(seen(path)) < 0.3


@pytest.mark.parametrize("name", PROFILES)
async def test_an_edit_that_changes_nothing_changes_no_number(edited: Call, name: str) -> None:
    path, _ = await edited(Network(unchanged), saved(all_colours(), icc_profile=PROFILES[name]))
    assert np.array_equal(stored(path)[0], all_colours())


@pytest.mark.parametrize("name", SPACES)
async def test_colours_outside_srgb_stay_as_saturated_as_the_edit_leaves_others(
    edited: Call, name: str
) -> None:
    """With half the light they have half the light, too; clipped to sRGB they would be greyer."""
    gamma = SPACES[name][1]
    expected = levels(curved(straightened(all_colours(), gamma) / 2, gamma))
    path, _ = await edited(Network(darker), saved(all_colours(), icc_profile=PROFILES[name]))
    assert difference(stored(path)[0], expected) < 1


async def test_where_the_hue_is_another_the_colour_is_the_network_s(edited: Call) -> None:
    data = saved(all_colours(), icc_profile=PROFILES["Display P3"])
    network = Network(lambda pixels: 255 - pixels)
    path, _ = await edited(network, data)
    assert difference(seen(path), 255 - network.given[0]) < 1


async def test_a_profile_that_only_leads_to_srgb_gives_a_result_in_srgb(edited: Call) -> None:
    network = Network(grey)
    data = saved(numbers_of(SCENE, "Adobe RGB"), icc_profile=table_profile(b"A2B0"))
    path, _ = await edited(network, data)
    assert difference(network.given[0], SCENE) < 1
    assert stored(path)[1] is None
    assert chroma(stored(path)[0]) == 0


@pytest.mark.parametrize("gamma", [1 / 256, 0.2])
async def test_a_profile_that_cannot_hold_greys_gives_a_result_in_srgb(
    edited: Call, gamma: float
) -> None:
    network = Network(lambda pixels: np.full_like(pixels, 100))
    path, _ = await edited(network, saved(SCENE, icc_profile=rgb_profile(SRGB, gamma)))
    assert stored(path)[1] is None
    assert (seen(path) == 100).all()


async def test_linear_light_is_kept(edited: Call) -> None:
    path, _ = await edited(Network(grey), saved(SCENE, icc_profile=rgb_profile(SRGB, 1.0)))
    assert stored(path)[1] is not None


# --- beside other pictures ---


async def test_each_picture_of_a_batch_is_edited_by_its_own_profile(
    make_service: MakeService, tmp_path: Path
) -> None:
    files = {"sRGB": saved(SCENE), "grey": saved(SCENE[:, :, 0], icc_profile=grey_profile(1.0))}
    for name in SPACES:
        files[name] = saved(numbers_of(SCENE, name), icc_profile=PROFILES[name])
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    paths = [str(tmp_path / f"{name}.png") for name in files]

    async with Client(build_mcp(make_service(Network(darker)))) as client:
        asked = {"image_paths": paths, "prompts": "x"}
        results = answer_of(await client.call_tool("batch_edit_images", asked))["results"]

    outputs = dict(
        zip(files, (Path(each["result"]["output_path"]) for each in results), strict=True)
    )
    for name in ("sRGB", *SPACES):
        assert difference(seen(outputs[name]), darker(SCENE)) < 1, name
    as_grey = np.repeat(SCENE[:, :, :1], 3, axis=2)
    assert difference(seen(outputs["grey"]), darker(levels(encoded(as_grey / 255.0)))) < 1


@pytest.mark.parametrize(
    "profile",
    [PROFILES["Display P3"], PROFILES["ProPhoto"], grey_profile(1.0)],
    ids=["P3", "ProPhoto", "linear grey"],
)
async def test_the_numbers_of_a_mask_count_and_not_its_colours(
    edited: Call, profile: bytes
) -> None:
    half = np.repeat(np.linspace(0, 255, 96).astype(np.uint8)[None], 64, axis=0)
    colourful = np.stack([half, half // 2, half], axis=-1)
    is_grey = profile[16:20] == b"GRAY"
    mask = half if is_grey else colourful
    data = saved(numbers_of(SCENE, "Adobe RGB"), icc_profile=PROFILES["Adobe RGB"])

    expected, _ = await edited(Network(grey), data, saved(mask))
    expected_bytes = stored(expected)[0]
    path, _ = await edited(Network(grey), data, saved(mask, icc_profile=profile))

    assert np.array_equal(stored(path)[0], expected_bytes)
    assert not np.array_equal(stored(path)[0], numbers_of(SCENE, "Adobe RGB"))


# --- where pictures are shown ---


def shown(answer: CallToolResult) -> list[Pixels]:
    """The pictures in an answer, which say nothing of a profile."""
    images = [block for block in answer.content if isinstance(block, ImageContent)]
    decoded = [Image.open(io.BytesIO(base64.b64decode(image.data))) for image in images]
    assert all("icc_profile" not in image.info for image in decoded)
    return [np.array(image.convert("RGB")) for image in decoded]


async def test_previews_of_results_and_of_rounds_over_mcp_are_in_srgb(edited: Call) -> None:
    data = saved(numbers_of(SCENE, "ProPhoto"), icc_profile=PROFILES["ProPhoto"])
    _, answer = await edited(Network(darker), data, reflection=True)
    result, first, second = shown(answer)
    assert difference(result, darker(SCENE)) < 5
    assert difference(first, SCENE) < 5
    assert difference(second, darker(SCENE)) < 5


def test_partial_images_are_in_srgb(make_service: MakeService) -> None:
    data = saved(numbers_of(SCENE, "ProPhoto"), icc_profile=PROFILES["ProPhoto"])

    def first(job: EditJob, step: int) -> Pixels | None:
        return canvas(job) if step in job.preview_steps else None

    with (
        serving(make_service(FakeWorker(predict=first))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client,
    ):
        events = client.images.edit(
            image=("in.png", data), prompt="x", stream=True, partial_images=1
        )
        pictures = [base64.b64decode(event.b64_json) for event in events]
    partial, completed = (Image.open(io.BytesIO(each)) for each in pictures)
    assert "icc_profile" not in partial.info
    assert difference(np.array(partial.convert("RGB")), SCENE) < 1
    assert completed.info["icc_profile"] == PROFILES["ProPhoto"]
