"""Regions: a crop around the mask at full size, and a canvas that grows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from conftest import MakeService, edits_of
from fakes import FakeWorker, inverted
from step1x_edit.channel import EditJob, Progress
from step1x_edit.errors import ImageAspectError, ImageTooLargeError, InvalidParameterError
from step1x_edit.model.config import DEMO
from step1x_edit.pictures.images import Pixels, read_edit_record
from step1x_edit.pictures.regions import Margins, margins_of
from step1x_edit.service.service import EditService

LEFT, TOP, RIGHT, BOTTOM = 700, 300, 760, 340
"""What the mask of the large picture lets change."""
CONTEXT = 32  # pixels on each side, because half of 60 is less


class Seen(FakeWorker):
    """Inverts pictures and keeps the jobs."""

    def __init__(self, **options: Any) -> None:
        self.jobs: list[EditJob] = []
        super().__init__(paint=self._invert, **options)

    def _invert(self, job: EditJob) -> Pixels:
        self.jobs.append(job)
        return inverted(job)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A picture that is larger than the network's, and beside it mask.png."""
    pixels = np.random.default_rng(1).integers(0, 256, (400, 800, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    mask = Image.new("L", (800, 400))
    mask.paste(255, (LEFT, TOP, RIGHT, BOTTOM))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "large.png"


async def edit(service: EditService, path: Path, **arguments: object) -> tuple[Pixels, Any]:
    """The pixels of the result, and the answer's metadata."""
    request = service.read_edit({"image_path": path, "prompt": "x", "seed": 1, **arguments})
    answer = (await edits_of(service).edit(request)).answer.to_dict()
    return np.asarray(Image.open(answer["output_path"])), answer["metadata"]


def pixels_of(path: Path) -> Pixels:
    return np.asarray(Image.open(path))


# --- region --------------------------------------------------------------------------------------


async def test_full_edits_what_may_change_and_its_surroundings_and_leaves_the_rest(
    make_service: MakeService, large: Path
) -> None:
    worker, before = Seen(), pixels_of(large)

    arguments = {"mask_path": large.with_name("mask.png"), "region": "full", "size_level": 512}
    after, metadata = await edit(make_service(worker), large, **arguments)

    # 60 + 2 · 32 wide would be enlarged 4.5 times, so there is more context: 128 · 128 pixels.
    left, top, right, bottom = metadata["region"]["box"]
    assert max(left - LEFT, RIGHT - right, top - TOP, BOTTOM - bottom) <= -CONTEXT
    assert metadata["region"]["scale"] == pytest.approx(4, abs=0.05)
    assert (metadata["width"], metadata["height"]) == (800, 400)
    assert worker.jobs[0].image is not None
    assert np.array_equal(worker.jobs[0].image, before[top:bottom, left:right])
    inside = np.zeros((400, 800), bool)
    inside[TOP:BOTTOM, LEFT:RIGHT] = True
    assert np.array_equal(after[~inside], before[~inside])
    middle = np.s_[TOP + 10 : BOTTOM - 10, LEFT + 10 : RIGHT - 10]
    assert np.array_equal(after[middle], 255 - before[middle])


async def test_a_file_names_the_region_only_if_it_is_full(
    make_service: MakeService, large: Path
) -> None:
    service, mask = make_service(), large.with_name("mask.png")

    _, whole = await edit(service, large, mask_path=mask, region="whole")
    await edit(service, large, mask_path=mask, region="full")

    assert "region" not in whole
    assert b'"region"' not in large.with_name("large_edited.png").read_bytes()
    record = read_edit_record(large.with_name("large_edited_2.png"))
    assert record is not None
    assert record.region == "full"
    assert b'"outpaint"' not in large.with_name("large_edited_2.png").read_bytes()


async def test_a_mask_of_the_whole_picture_makes_both_regions_the_same(
    make_service: MakeService, large: Path
) -> None:
    Image.new("L", (800, 400), 255).save(mask := large.with_name("white.png"))
    worker = Seen()
    service = make_service(worker)

    whole, _ = await edit(service, large, mask_path=mask)
    full, metadata = await edit(service, large, mask_path=mask, region="full")

    assert np.array_equal(full, whole)
    assert metadata["region"] == {"box": [0, 0, 800, 400], "scale": 1.81}
    assert worker.jobs[1].image is not None
    assert worker.jobs[1].image.shape == (400, 800, 3)


@pytest.mark.parametrize(
    ("may_change", "box"),
    [
        ((0, 0, 300, 300), [0, 0, 600, 400]),  # at a corner the context is on the other sides
        ((100, 100, 700, 104), [0, 0, 800, 400]),
        ((0, 190, 800, 210), [0, 0, 800, 400]),  # as wide as the picture
        ((300, 100, 500, 200), [200, 0, 600, 300]),  # not narrower than 1 : 2, and 3 : 4 here
    ],
)
async def test_a_crop_has_context_within_the_picture(
    make_service: MakeService, large: Path, may_change: tuple[int, int, int, int], box: list[int]
) -> None:
    image = Image.new("L", (800, 400))
    image.paste(255, may_change)
    image.save(mask := large.with_name("part.png"))

    _, metadata = await edit(make_service(), large, mask_path=mask, region="full", size_level=512)

    assert metadata["region"]["box"] == box


async def test_turbo_gets_the_mask_of_the_crop(make_service: MakeService, large: Path) -> None:
    worker, mask = Seen(), large.with_name("mask.png")

    arguments = {"mask_path": mask, "region": "full", "mode": "turbo"}
    _, metadata = await edit(make_service(worker), large, **arguments)

    left, top, right, bottom = metadata["region"]["box"]
    assert worker.jobs[0].mask is not None
    assert np.array_equal(worker.jobs[0].mask, pixels_of(mask)[top:bottom, left:right])


async def test_previews_of_a_crop_show_the_whole_picture(
    make_service: MakeService, large: Path
) -> None:
    service, previews = make_service(), []

    async def report(event: Progress) -> None:
        if event.preview is not None:
            previews.append(event.preview)

    arguments = {"prompt": "x", "region": "full", "size_level": 512, "num_steps": 10}
    request, mask = service.read_picture(arguments), large.with_name("mask.png").read_bytes()
    await service.edit_picture(large.read_bytes(), request, report, mask=mask, previews=1)

    height, width = previews[0].shape[:2]
    assert width == pytest.approx(2 * height, abs=1)
    corner, middle = previews[0][0, 0], previews[0][height * 320 // 400, width * 730 // 800]
    assert (middle == 5).all()  # the fake worker's preview is the number of its step
    assert (corner > 5).any()


async def test_the_model_judges_the_crop(make_service: MakeService, large: Path) -> None:
    service, mask = make_service(FakeWorker(model="v1.2")), large.with_name("mask.png")

    arguments = {"prompt": "x", "region": "full", "size_level": 512, "reflection": True}
    request = service.read_picture(arguments)
    edited = await service.edit_picture(large.read_bytes(), request, mask=mask.read_bytes())

    assert edited.metadata.region is not None
    left, top, right, bottom = edited.metadata.region.box
    shown = [Image.open(io.BytesIO(small)).size for small in edited.rounds]
    assert shown == [(right - left, bottom - top)] * 2
    assert edited.picture.pixels.shape == (400, 800, 3)


# --- outpaint ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outpaint", "top", "right", "bottom", "left"),
    [
        ("8", 8, 8, 8, 8),
        ("25%", 12, 16, 12, 16),
        ("0, 10px", 0, 10, 0, 10),
        ("1 2 3", 1, 2, 3, 2),
        ([0, "8px"], 0, 8, 0, 8),
        ("[1, 2, 3, 4]", 1, 2, 3, 4),
        ("0 0 0 100%", 0, 0, 0, 64),
    ],
)
async def test_the_canvas_grows_and_the_old_pixels_stay(
    make_service: MakeService,
    photo: Path,
    outpaint: object,
    top: int,
    right: int,
    bottom: int,
    left: int,
) -> None:
    worker, before = Seen(), pixels_of(photo)

    after, metadata = await edit(make_service(worker), photo, outpaint=outpaint)

    assert after.shape == (48 + top + bottom, 64 + left + right, 3)
    old = np.s_[top : top + 48, left : left + 64]
    assert np.array_equal(after[old], before)
    assert (metadata["width"], metadata["height"]) == after.shape[1::-1]
    new = 1 - before[..., 0].size / after[..., 0].size
    assert 0.8 * new < metadata["changed_share"] <= round(new, 4)
    assert worker.jobs[0].image is not None
    assert np.array_equal(worker.jobs[0].image[old], before)
    record = read_edit_record(photo.with_name("photo_edited.png"))
    assert record is not None
    assert record.outpaint == metadata["outpaint"]
    assert margins_of(record.outpaint, 64, 48) == Margins(top, right, bottom, left)


async def test_what_a_mask_selects_may_change_too(make_service: MakeService, large: Path) -> None:
    before, worker = pixels_of(large), Seen()

    arguments = {"outpaint": "0 0 0 100", "mask_path": large.with_name("mask.png")}
    after, _ = await edit(make_service(worker), large, **arguments, mode="turbo")

    changed = (after[:, 100:] != before).any(axis=-1)
    assert changed[TOP + 10 : BOTTOM - 10, LEFT + 10 : RIGHT - 10].all()
    changed[TOP:BOTTOM, LEFT:RIGHT] = False
    assert not changed.any()
    assert worker.jobs[0].mask is not None
    assert worker.jobs[0].mask.shape == (400, 900)


async def test_full_edits_the_new_area_and_what_is_beside_it(
    make_service: MakeService, large: Path
) -> None:
    worker, before = Seen(), pixels_of(large)

    after, metadata = await edit(make_service(worker), large, outpaint="0 100 0 0", region="full")

    assert metadata["region"]["box"][::2] == [400, 900]
    assert np.array_equal(after[:, :800], before)


async def test_transparency_and_profile_are_kept_on_a_larger_canvas(
    make_service: MakeService, photo: Path
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.open(photo).convert("RGBA")
    image.paste((1, 2, 3, 128), (0, 0, 10, 48))
    image.save(photo, icc_profile=profile)
    service = make_service()

    after, _ = await edit(service, photo, outpaint="0 8")

    assert np.array_equal(after[:, 8:-8], pixels_of(photo))
    assert (after[:, :8, 3] == 255).all()
    assert Image.open(photo.with_name("photo_edited.png")).info["icc_profile"] == profile


async def test_the_input_is_shown_with_nothing_around_it(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service()

    request = service.read_picture({"prompt": "x", "outpaint": "8"})
    edited = await service.edit_picture(photo.read_bytes(), request)

    assert edited.source is not None
    assert edited.source.pixels.shape == edited.picture.pixels.shape
    assert edited.source.alpha is not None
    assert not edited.source.alpha[:8].any()
    assert np.array_equal(edited.source.pixels[8:-8, 8:-8], pixels_of(photo))


async def test_a_canvas_that_is_too_large_is_refused_before_the_edit(
    make_service: MakeService, large: Path
) -> None:
    worker = FakeWorker()
    service = make_service(worker, max_megapixels=1)

    with pytest.raises(ImageTooLargeError, match="2400×1200 pixels, at most 1 megapixels"):
        await edit(service, large, outpaint="100%")
    with pytest.raises(ImageAspectError, match="6800×400 pixels"):
        await edit(make_service(worker), large, outpaint="0 3000")
    webp = {"outpaint": "8000", "output_path": large.with_name("a.webp")}
    with pytest.raises(InvalidParameterError, match="WEBP holds at most 16383 pixels per side"):
        await edit(make_service(worker), large, **webp)
    assert worker.started == []


async def test_only_the_demo_says_that_it_cannot_invent(
    make_service: MakeService, photo: Path
) -> None:
    demo = make_service(FakeWorker(version=DEMO.version, model="demo"))

    _, grown = await edit(demo, photo, outpaint="8")
    _, same = await edit(demo, photo)
    _, real = await edit(make_service(FakeWorker(version="v1.1")), photo, outpaint="8")

    assert grown["warning"].startswith("the demo checkpoint cannot invent what lies outside")
    assert "warning" not in same
    assert "warning" not in real


@pytest.mark.parametrize("nothing", ["", "0", 0, "0px 0%", None])
async def test_adding_nothing_is_an_edit_of_the_picture_as_it_is(
    make_service: MakeService, photo: Path, nothing: object
) -> None:
    after, metadata = await edit(make_service(), photo, outpaint=nothing)

    assert np.array_equal(after, 255 - pixels_of(photo))
    assert "outpaint" not in metadata


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"region": "all"}, "region must be whole or full, got 'all'"),
        ({"region": "full"}, "region full needs a mask, which says what may change, or outpaint"),
        (
            {"outpaint": "1 2 3 4 5"},
            "outpaint must be one to four sizes in pixels or percent, such",
        ),
        ({"outpaint": "-8"}, "outpaint must be one to four sizes .*, got '-8'"),
        ({"outpaint": True}, "outpaint must be a text, got true"),
        ({"outpaint": [8, None]}, "outpaint must be a text, got a list"),
        ({"outpaint": [-8]}, "outpaint must be one to four sizes .*, got '-8'"),
        ({"outpaint": 10**400}, "outpaint must be a text, got a huge number"),
        ({"outpaint": "0.1%"}, "outpaint 0.1% adds no pixel to a picture of 64×48"),
    ],
)
async def test_what_cannot_be_done_is_refused_in_a_sentence(
    make_service: MakeService, photo: Path, asked: dict[str, object], sentence: str
) -> None:
    worker = FakeWorker()

    with pytest.raises(InvalidParameterError, match=f"Invalid parameter: {sentence}"):
        await edit(make_service(worker), photo, **asked)
    assert worker.started == []
