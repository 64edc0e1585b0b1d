"""Signed results as another reader of C2PA sees them, at the door of the service."""

from __future__ import annotations

import io
import json
import socketserver
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from PIL import Image

from certificates import SIGNER, certified
from conftest import MakeService, edits_of
from fakes import FakeWorker, canvas
from picture_files import scene, seen
from step1x_edit.errors import SettingsError
from step1x_edit.pictures.images import read_edit_record
from step1x_edit.pictures.manifests import carries_manifest

SCENE = scene()
FORMATS = [".png", ".jpg", ".webp", ".avif", ".tif"]
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NO_NETWORK = {"verify": {"remote_manifest_fetch": False}}

Edited = Callable[..., Any]


def saved(name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(SCENE).save(buffer, name, **options)
    return buffer.getvalue()


def store_of(data: bytes) -> dict[str, Any]:
    """All manifests of a file, checked; fails if there is none."""
    context = c2pa.Context.from_dict(NO_NETWORK)
    with c2pa.Reader("", io.BytesIO(data), context=context) as reader:
        store: dict[str, Any] = json.loads(reader.json())
    return store


def manifest_of(data: bytes) -> dict[str, Any]:
    """The manifest of a file that is as it was signed, by somebody whom nobody here knows."""
    store = store_of(data)
    assert store["validation_state"] == "Valid"
    assert [each["code"] for each in store["validation_status"]] == ["signingCredential.untrusted"]
    manifest: dict[str, Any] = store["manifests"][store["active_manifest"]]
    return manifest


def actions_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    (assertion,) = (each for each in manifest["assertions"] if "c2pa.actions" in each["label"])
    actions: list[dict[str, Any]] = assertion["data"]["actions"]
    return actions


@pytest.fixture
def edited(make_service: MakeService, tmp_path: Path) -> Edited:
    """Edit a file with a service that signs, unless it has other settings."""
    signing = make_service(FakeWorker(paint=canvas), **certified(tmp_path / "c2pa"))

    async def edit(data: bytes, to: str = "out.png", **settings: Any) -> tuple[bytes, str | None]:
        service = make_service(FakeWorker(paint=canvas), **settings) if settings else signing
        (tmp_path / "in.x").write_bytes(data)
        paths = {"image_path": str(tmp_path / "in.x"), "output_path": str(tmp_path / to)}
        seed = 6 if b"c2pa" in data else 5  # the seed of the input would be warned of
        asked = {**paths, "prompt": "red hat", "seed": seed, "overwrite": True}
        answer = (await edits_of(service).edit(service.read_edit(asked))).answer
        return Path(answer.output_path).read_bytes(), answer.metadata.warning

    return edit


@pytest.mark.parametrize("suffix", FORMATS)
async def test_a_signed_result_says_what_was_done_to_its_input(edited: Edited, suffix: str) -> None:
    data, warning = await edited(saved("JPEG"), f"out{suffix}")
    unsigned, _ = await edited(saved("JPEG"), f"out{suffix}", max_queue=1)

    manifest = manifest_of(data)
    opened, edit = actions_of(manifest)
    assert opened["action"] == "c2pa.opened"
    assert opened["parameters"]["ingredients"]
    assert edit["action"] == "c2pa.edited"
    assert edit["digitalSourceType"] == f"{SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia"
    assert edit["softwareAgent"] == {"name": "fake"}
    (record,) = edit["parameters"].values()
    assert (record["prompt"], record["seed"]) == ("red hat", 5)
    (parent,) = manifest["ingredients"]
    assert (parent["relationship"], parent["format"]) == ("parentOf", "image/jpeg")
    assert "active_manifest" not in parent
    assert manifest["claim_generator_info"][0]["name"] == "step1x-edit"
    assert manifest["signature_info"]["common_name"] == SIGNER
    assert warning is None
    assert np.array_equal(seen(data), seen(unsigned))
    assert read_edit_record(data) == read_edit_record(unsigned) is not None


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
async def test_an_input_of_any_format_is_the_parent(edited: Edited, name: str) -> None:
    (parent,) = manifest_of((await edited(saved(name)))[0])["ingredients"]
    assert (parent["relationship"], parent["format"]) == ("parentOf", f"image/{name.lower()}")


@pytest.mark.parametrize("suffix", FORMATS)
async def test_the_manifest_of_the_input_is_kept_inside(edited: Edited, suffix: str) -> None:
    first, _ = await edited(saved("JPEG"), f"out{suffix}")
    second, warning = await edited(first, "again.jpg")

    store = store_of(second)
    (parent,) = manifest_of(second)["ingredients"]
    assert parent["active_manifest"] == store_of(first)["active_manifest"]
    assert store["manifests"].keys() == {store["active_manifest"], parent["active_manifest"]}
    failures = parent["validation_results"]["activeManifest"]["failure"]
    assert [each["code"] for each in failures] == ["signingCredential.untrusted"]
    assert warning is None


@pytest.mark.parametrize("suffix", FORMATS)
async def test_without_a_certificate_nothing_of_the_input_s_manifest_is_left(
    edited: Edited, suffix: str
) -> None:
    signed, _ = await edited(saved("JPEG"), f"out{suffix}")
    assert carries_manifest(signed)
    result, warning = await edited(signed, f"again{suffix}", max_queue=1)

    assert b"c2pa" not in result
    assert b"jumb" not in result
    assert warning is None


async def test_an_input_that_was_changed_after_it_was_signed_is_told(edited: Edited) -> None:
    signed, _ = await edited(saved("JPEG"), "in.jpg")
    after = signed.index(b"\xff\xda") + 100
    changed = signed[:after] + bytes([signed[after] ^ 1]) + signed[after + 1 :]

    result, warning = await edited(changed)

    assert warning == "the input was changed after it had been signed: its C2PA manifest is invalid"
    (parent,) = manifest_of(result)["ingredients"]
    failures = parent["validation_results"]["activeManifest"]["failure"]
    assert "assertion.dataHash.mismatch" in [each["code"] for each in failures]


@pytest.mark.parametrize("part", [b"jumdc2pa", b"c2pa.actions", b"cbor"])
async def test_an_input_whose_manifest_is_damaged_is_edited_and_told(
    edited: Edited, part: bytes
) -> None:
    signed, _ = await edited(saved("JPEG"), "in.jpg")
    at = signed.index(part) + 1
    result, warning = await edited(signed[:at] + b"~" + signed[at + 1 :])

    assert warning == "the C2PA manifest of the input is invalid"
    (parent,) = manifest_of(result)["ingredients"]
    assert parent["relationship"] == "parentOf"
    assert "active_manifest" not in parent


@pytest.mark.parametrize("part", [b"exclusions", b"sha256", b"pad"])
async def test_damage_that_only_signing_finds_leaves_the_result_signed(
    edited: Edited, part: bytes
) -> None:
    signed, _ = await edited(saved("JPEG"), "in.jpg")
    at = signed.index(part)
    result, warning = await edited(signed[:at] + b"\xff" + signed[at + 1 :])

    assert warning == "the C2PA manifest of the input is invalid"
    assert manifest_of(result)["ingredients"][0]["relationship"] == "parentOf"


async def test_a_manifest_that_is_elsewhere_is_not_fetched(edited: Edited) -> None:
    asked = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(100))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        link = f"http://127.0.0.1:{server.server_address[1]}/manifest.c2pa"
        xmp = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
            xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
            xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="{link}"/></rdf:RDF>
            </x:xmpmeta>"""
        result, warning = await edited(saved("JPEG", xmp=xmp.encode()))
        server.shutdown()

    manifest_of(result)
    assert (warning, asked) == (None, [])


async def test_a_bmp_is_neither_signed_nor_marked_and_this_is_told(edited: Edited) -> None:
    result, warning = await edited(saved("PNG"), "out.bmp")
    assert not carries_manifest(result)
    assert warning is not None
    assert warning.startswith("BMP cannot say that a model made the picture")


async def test_prompts_that_files_may_not_have_are_not_in_the_manifest(
    edited: Edited, tmp_path: Path
) -> None:
    settings = {**certified(tmp_path / "c2pa"), "record_prompt": False}
    result, _ = await edited(saved("PNG"), **settings)

    assert actions_of(manifest_of(result))[1]["parameters"]
    assert b"red hat" not in result


async def test_a_picture_from_words_alone_is_created(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service(model_version="v1.1", **certified(tmp_path / "c2pa"))
    asked = {"prompt": "a fox", "output_path": str(tmp_path / "fox.jpg"), "width": 256}
    await edits_of(service).generate(service.read_generate(asked))

    manifest = manifest_of((tmp_path / "fox.jpg").read_bytes())
    (created,) = actions_of(manifest)
    assert created["action"] == "c2pa.created"
    assert created["digitalSourceType"] == f"{SOURCE_TYPES}trainedAlgorithmicMedia"
    assert not manifest.get("ingredients")


# --- keys ---


@pytest.mark.parametrize(
    "new_key",
    [
        ed25519.Ed25519PrivateKey.generate,
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
        lambda: rsa.generate_private_key(65537, 2048),
    ],
    ids=["Ed25519", "P-384", "P-521", "RSA"],
)
async def test_keys_of_all_types_that_c2pa_allows_sign(
    edited: Edited, tmp_path: Path, new_key: Callable[[], Any]
) -> None:
    result, _ = await edited(saved("PNG"), **certified(tmp_path / "other", new_key()))
    manifest_of(result)


def missing(folder: Path) -> dict[str, Path]:
    return {**certified(folder), "c2pa_key": folder / "no.pem"}


def mixed_up(folder: Path) -> dict[str, Path]:
    found = certified(folder)
    return {"c2pa_cert": found["c2pa_key"], "c2pa_key": found["c2pa_cert"]}


def without_key(folder: Path) -> dict[str, Path]:
    found = certified(folder)
    return {**found, "c2pa_key": found["c2pa_cert"]}


def of_another(folder: Path) -> dict[str, Path]:
    return {**certified(folder), "c2pa_key": certified(folder / "other")["c2pa_key"]}


def of_bitcoin(folder: Path) -> dict[str, Path]:
    return certified(folder, ec.generate_private_key(ec.SECP256K1()))


def expired(folder: Path) -> dict[str, Path]:
    return certified(folder, days=-1)


def unheard_of(folder: Path) -> dict[str, Path]:
    """The key has a type that nobody has registered."""
    settings = certified(folder)
    key = "MBICAQAwBwYFKw4DAgoEBAECAwQ="
    settings["c2pa_key"].write_text(
        f"-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----"
    )
    return settings


def short(folder: Path) -> dict[str, Path]:
    return certified(folder, rsa.generate_private_key(65537, 1024))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (missing, r"C2PA_KEY .*no\.pem cannot be read \(no such file or directory\)"),
        (mixed_up, r"C2PA_CERT .*key\.pem is no certificate in PEM"),
        (without_key, r"C2PA_KEY .*cert\.pem is no private key in PEM"),
        (of_another, r"C2PA_KEY is not the key of the first certificate in C2PA_CERT"),
        (of_bitcoin, r"C2PA_KEY has a type that C2PA does not allow; it allows EC \(P-256"),
        (unheard_of, r"C2PA_KEY .*key\.pem has a type that C2PA does not allow; it allows EC"),
        (expired, r"C2PA_CERT cannot sign: the certificate was not valid at time of signing; it"),
        (short, r"C2PA_CERT cannot sign: the certificate is invalid; it must be"),
    ],
)
def test_a_key_that_cannot_sign_prevents_the_start(
    make_service: MakeService, tmp_path: Path, settings: Any, sentence: str
) -> None:
    with pytest.raises(SettingsError, match=f"^Invalid settings: {sentence}"):
        make_service(**settings(tmp_path / "c2pa"))


def test_a_certificate_without_the_extra_prevents_the_start(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(SettingsError, match=r"need an extra: pip install 'step1x-edit\[c2pa\]'$"):
        make_service(**certified(tmp_path / "c2pa"))
