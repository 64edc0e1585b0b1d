"""C2PA: signs results, and reads what the manifest of a picture claims.

The library comes with the extra `step1x-edit[c2pa]` and is imported when there is something to sign
or to read. Nothing is ever fetched: no remote manifest, no time stamp, no list of revoked
certificates.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from step1x_edit.errors import SettingsError
from step1x_edit.pictures.provenance import GENERATED
from step1x_edit.schemas.answers import ActionClaim, IngredientClaim, ManifestClaim
from step1x_edit.schemas.requests import Record

if TYPE_CHECKING:
    import c2pa

log = logging.getLogger(__name__)

MISSING: Final = "pip install 'step1x-edit[c2pa]'"
"""What installs the library."""

# The description of the box that holds all manifests of a file, the same in every format.
_STORE: Final = b"jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"
_OFFLINE: Final = {
    "version": 1,
    "core": {"allowed_network_hosts": []},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {
        "thumbnail": {"enabled": False},
        # What the signer itself says, and not only passes on.
        "created_assertion_labels": ["c2pa.actions", "c2pa.ingredient"],
    },
}
_RECORD: Final = "step1x-edit.record"
_INPUT: Final = "input"
_PARENT: Final = {"relationship": "parentOf", "label": _INPUT}
_UNTRUSTED: Final = "signingCredential.untrusted"  # no list of trusted signers is installed
_SMALLEST_GIF: Final = b"GIF89a\1\0\1\0\0\0\0;"
_KEYS: Final = (
    "has a type that C2PA does not allow; it allows EC (P-256, P-384, P-521), RSA and Ed25519"
)
_CURVES: Final = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def carries_manifest(data: bytes) -> bool:
    """Whether there is a C2PA manifest in a file; the library is not needed."""
    return _STORE in data


class Signatory:
    """Signs results with the certificate and the key of the operator."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read both files, and raise SettingsError if no result could be signed with them."""
        try:
            import c2pa
            import cryptography  # noqa: F401 - a part of the same extra
        except ImportError:
            raise SettingsError(f"C2PA_CERT and C2PA_KEY need an extra: {MISSING}") from None
        chain = _read("C2PA_CERT", cert)
        algorithm, private = _key_for(chain, cert, key)
        try:
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, private, None))
            self._context = c2pa.Context.from_dict(_OFFLINE, signer)
            trial = self._builder({"action": "c2pa.created", "digitalSourceType": GENERATED})
            self._signed(trial, "image/gif", _SMALLEST_GIF)
        except c2pa.C2paError as error:
            raise SettingsError(
                f"C2PA_CERT cannot sign: {_reason(error)}; it must be valid now, for digital "
                "signatures, and for e-mail protection or document signing"
            ) from None

    def sign(
        self, data: bytes, media_type: str, record: Record, source_type: str, original: bytes | None
    ) -> tuple[bytes, str | None]:
        """The file with a manifest, and a warning if something is wrong with one of them.

        `original` is the input of an edit. It becomes the parent of the result, with its own
        manifest. A file that cannot be signed is returned as it is.
        """
        from c2pa import C2paError

        action = {
            "action": "c2pa.created" if original is None else "c2pa.edited",
            "digitalSourceType": source_type,
            "softwareAgent": {"name": record.model},
            "parameters": {_RECORD: record.model_dump(mode="json", exclude_none=True)},
        }
        warning = None if original is None else self._complaint(original)
        reason = ""
        for build in (self._builder, self._builder_naming):
            try:
                return self._signed(build(action, original), media_type, data), warning
            except C2paError as error:  # first, maybe, because the input's manifest is damaged
                reason = _reason(error)
        log.warning("a result is not signed: %s", reason)
        return data, f"the result is not signed: {reason}"

    def _complaint(self, original: bytes) -> str | None:
        """What is wrong with the manifest of an input, if it has a broken one."""
        claim = _claim(original, self._context)
        if claim is None or claim.status != "invalid":
            return None
        if any("Hash.mismatch" in problem for problem in claim.problems):
            return "the input was changed after it had been signed: its C2PA manifest is invalid"
        return "the C2PA manifest of the input is invalid"

    def _builder(self, action: dict[str, Any], original: bytes | None = None) -> c2pa.Builder:
        """What was done, and the input, with its own manifest."""
        from c2pa import Builder

        builder = Builder(_manifest(action, original), self._context)
        if original is not None:
            builder.add_ingredient(_PARENT, _media_type(original), io.BytesIO(original))
        return builder

    def _builder_naming(self, action: dict[str, Any], original: bytes | None) -> c2pa.Builder:
        """The same without the input's own manifest."""
        from c2pa import Builder

        manifest = _manifest(action, original)
        if original is not None:
            manifest["ingredients"] = [{**_PARENT, "format": _media_type(original)}]
        return Builder(manifest, self._context)

    def _signed(self, builder: c2pa.Builder, media_type: str, data: bytes) -> bytes:
        signed = io.BytesIO()
        builder.sign(media_type, io.BytesIO(data), signed)
        return signed.getvalue()


def _manifest(action: dict[str, Any], original: bytes | None) -> dict[str, Any]:
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [_INPUT]}}
    actions = [action] if original is None else [opened, action]
    return {
        "claim_generator_info": [{"name": "step1x-edit", "version": version("step1x-edit")}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": actions}}],
    }


# --- the key -------------------------------------------------------------------------------------


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise SettingsError(f"{setting} {path} cannot be read ({reason})") from None


def _key_for(chain: bytes, cert: Path, key: Path) -> tuple[str, bytes]:
    """The algorithm to sign with, and the private key in the form that the library reads."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        certified = x509.load_pem_x509_certificate(chain).public_key()
    except ValueError:
        raise SettingsError(f"C2PA_CERT {cert} is no certificate in PEM") from None
    except UnsupportedAlgorithm:
        raise SettingsError(f"the key of C2PA_CERT {cert} {_KEYS}") from None
    try:
        private = serialization.load_pem_private_key(_read("C2PA_KEY", key), password=None)
    except TypeError:
        raise SettingsError(f"C2PA_KEY {key} needs a password; save it without one") from None
    except ValueError:
        raise SettingsError(f"C2PA_KEY {key} is no private key in PEM") from None
    except UnsupportedAlgorithm:
        raise SettingsError(f"C2PA_KEY {key} {_KEYS}") from None
    public = (
        serialization.Encoding.PEM,
        serialization.PublicFormat.SubjectPublicKeyInfo,
    )
    if private.public_key().public_bytes(*public) != certified.public_bytes(*public):
        raise SettingsError("C2PA_KEY is not the key of the first certificate in C2PA_CERT")
    return _algorithm_of(private), private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _algorithm_of(private: object) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match private:
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey():
            return "ps256"
        case ec.EllipticCurvePrivateKey() if private.curve.name in _CURVES:
            return _CURVES[private.curve.name]
    raise SettingsError(f"C2PA_KEY {_KEYS}")


def _reason(error: Exception) -> str:
    """The words of an error of the library in one line, without its kind."""
    return " ".join((str(error).partition(": ")[2] or str(error)).split())


# --- reading -------------------------------------------------------------------------------------


def claim_of(data: bytes) -> ManifestClaim | None:
    """What the C2PA manifest of a picture claims and whether it fits; None if there is none."""
    try:
        from c2pa import Context
    except ImportError:
        return ManifestClaim(status="unchecked") if carries_manifest(data) else None
    return _claim(data, Context.from_dict(_OFFLINE))


def _claim(data: bytes, context: c2pa.Context) -> ManifestClaim | None:
    from c2pa import C2paError, Reader

    try:
        with Reader("", io.BytesIO(data), context=context) as reader:
            store = json.loads(reader.json())
    except (C2paError.ManifestNotFound, C2paError.NotSupported):
        return None
    except C2paError as error:
        if str(error).startswith("Remote"):
            return ManifestClaim(status="elsewhere")
        if isinstance(error, C2paError.Other) and not carries_manifest(data):
            return None  # the library cannot read the picture
        return ManifestClaim(status="invalid", problems=[str(error).rstrip(": ")])
    manifest = store["manifests"][store["active_manifest"]]
    problems = list(_problems(store.get("validation_results") or {}))
    return ManifestClaim(
        status="invalid" if problems or store["validation_state"] == "Invalid" else "valid",
        problems=problems,
        signer=_signer(manifest.get("signature_info") or {}),
        generator=_generator(manifest),
        actions=list(_actions(manifest)),
        ingredients=[_ingredient(each) for each in manifest.get("ingredients") or ()],
    )


def _problems(results: dict[str, Any]) -> Iterator[str]:
    """The codes of what is wrong, except that nobody here vouches for the signer."""
    deltas = [each["validationDeltas"] for each in results.get("ingredientDeltas") or ()]
    for part in (results.get("activeManifest") or {}, *deltas):
        for failure in part.get("failure") or ():
            if failure["code"] != _UNTRUSTED:
                yield failure["code"]


def _signer(signature: dict[str, Any]) -> str | None:
    names = (signature.get("common_name"), signature.get("issuer"))
    return ", ".join(name for name in names if name) or None


def _generator(manifest: dict[str, Any]) -> str | None:
    for info in manifest.get("claim_generator_info") or ():
        return " ".join(filter(None, (info.get("name"), info.get("version"))))
    generator: str | None = manifest.get("claim_generator")
    return generator


def _actions(manifest: dict[str, Any]) -> Iterator[ActionClaim]:
    for assertion in manifest.get("assertions") or ():
        if assertion["label"].startswith("c2pa.actions"):
            for action in assertion["data"].get("actions") or ():
                agent = action.get("softwareAgent")
                yield ActionClaim(
                    action=action["action"],
                    digital_source_type=action.get("digitalSourceType"),
                    software=agent.get("name") if isinstance(agent, dict) else agent,
                )


def _ingredient(ingredient: dict[str, Any]) -> IngredientClaim:
    results = ingredient.get("validation_results") or {}
    has_manifest = ingredient.get("active_manifest") is not None
    status = "invalid" if any(_problems(results)) else "valid"
    return IngredientClaim(
        relationship=ingredient.get("relationship") or "componentOf",
        title=ingredient.get("title"),
        manifest=status if has_manifest else None,
    )


def _media_type(data: bytes) -> str:
    from step1x_edit.pictures.images import format_of

    return f"image/{format_of(data).lower()}"
