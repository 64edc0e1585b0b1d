"""What `inspect` says about pictures of this program and of others."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from certificates import certified
from picture_files import scene
from step1x_edit import __version__
from step1x_edit.interfaces.cli import app
from step1x_edit.pictures.images import Picture, encode
from step1x_edit.pictures.result_files import ResultFiles
from step1x_edit.schemas.requests import EditRecord, GenerationRecord, without_prompts
from step1x_edit.settings import Settings

run = CliRunner()
RECORD = EditRecord(model="demo", prompt="add a red hat", seed=42, loras=["hand:0.5", "look:1"])
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
xmlns:dc="http://purl.org/dc/elements/1.1/"
xmlns:ext="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
ext:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture">
<dc:creator><rdf:Seq><rdf:li>Ada</rdf:li><rdf:li>Grace &#x9b;31m</rdf:li></rdf:Seq></dc:creator>
<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">© Ada</rdf:li></rdf:Alt></dc:rights>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


@pytest.fixture(autouse=True)
def _start_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def signed(tmp_path: Path) -> bytes:
    """A signed result whose input was signed too."""
    files = ResultFiles(Settings(_env_file=None, **certified(tmp_path / "c2pa")))  # type: ignore
    first = files.write(Picture(scene()), ".png", RECORD, original("PNG")).data
    return files.write(Picture(scene()), ".jpg", RECORD, first).data


def original(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, name, xmp=XMP.encode())
    return buffer.getvalue()


def said_of(data: bytes) -> dict[str, str]:
    """What the command prints about a file, by the name that begins each line."""
    Path("a.x").write_bytes(data)
    done = run.invoke(app, ["inspect", "a.x"])
    assert done.exit_code == 0, done.stderr
    return {line[:18].strip(): line[19:] for line in done.stdout.splitlines()}


def test_a_signed_result_is_told_in_plain_words(signed: bytes) -> None:
    said = said_of(signed)
    composite = "edited with a generative model (compositeWithTrainedAlgorithmicMedia)"
    assert said == {
        "picture": f"JPEG, 96 × 64 pixels, {len(signed):,} bytes",
        "record": "an edit by step1x-edit with the model demo",
        "prompt": "add a red hat",
        "num steps": "28",
        "guidance scale": "6.0",
        "size level": "1024",
        "seed": "42",
        "loras": "hand:0.5, look:1",
        "source type": composite,
        "C2PA": "valid: the file is as it was signed",
        "signed by": "Ada's studio, Example (whether to trust this signer is not checked)",
        "signed with": f"step1x-edit {__version__}",
        "action": f"edited with demo: {composite}",
        "ingredient": "the picture it was before, with its own manifest, valid",
    }


def test_json_has_the_same_for_programs(signed: bytes) -> None:
    done = run.invoke(app, ["inspect", "-", "--json"], input=signed)

    answer = json.loads(done.stdout)
    assert answer["record"] == RECORD.model_dump(exclude_none=True)
    assert [each["action"] for each in answer["c2pa"]["actions"]] == ["c2pa.opened", "c2pa.edited"]
    assert answer["c2pa"]["ingredients"] == [{"relationship": "parentOf", "manifest": "valid"}]


def test_a_picture_of_another_program_is_told_without_its_control_characters() -> None:
    assert said_of(original("WEBP")) | {"picture": ""} == {
        "picture": "",
        "record": "none of step1x-edit",
        "source type": "captured by a camera (digitalCapture)",
        "creators": "Ada, Grace  31m",
        "copyright": "© Ada",
        "C2PA": "no manifest",
    }


@pytest.mark.parametrize("name", ["JPEG", "WEBP"])
def test_credit_in_exif_stands_beside_that_in_xmp(name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.Copyright] = "Ada L.", "2019 Ada\x07"
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, name, exif=exif, xmp=XMP.encode())

    said = said_of(buffer.getvalue())

    names = ("creators", "copyright", "exif artist", "exif copyright")
    assert [said.get(name) for name in names] == ["Ada, Grace  31m", "© Ada", "Ada L.", "2019 Ada "]


def test_a_picture_that_was_changed_after_it_was_signed_is_told(signed: bytes) -> None:
    at = signed.index(b"\xff\xda") + 100
    said = said_of(signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :])
    assert said["C2PA"] == "INVALID, do not rely on it: assertion.dataHash.mismatch"


def test_a_manifest_cannot_be_checked_without_the_extra(
    signed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    sentence = "there is a manifest, which cannot be checked: pip install 'step1x-edit[c2pa]'"
    assert said_of(signed)["C2PA"] == sentence
    assert said_of(original("JPEG"))["C2PA"] == "no manifest"


def test_prompts_that_were_left_out_are_told() -> None:
    record = without_prompts(GenerationRecord(model="v1.1", prompt="a fox", seed=1))
    said = said_of(encode(Picture(scene()), ".png", record))
    assert said["record"] == "generated from text by step1x-edit with the model v1.1"
    assert said["prompt"] == "left out of the file, so this cannot be replayed"
    assert said["source type"] == "generated by a model (trainedAlgorithmicMedia)"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "Image file not found: a.x\n"),
        (b"no picture", "Unsupported image format: the file is none of PNG"),
        (original("PNG")[:200], "Cannot read image: the file is damaged or incomplete\n"),
    ],
)
def test_what_is_no_picture_is_one_sentence(data: bytes | None, sentence: str) -> None:
    if data is not None:
        Path("a.x").write_bytes(data)
    done = run.invoke(app, ["inspect", "a.x"])

    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1
