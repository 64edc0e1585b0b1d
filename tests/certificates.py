"""Certificates and keys that C2PA accepts, made for tests."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SIGNER = "Ada's studio"
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def certified(folder: Path, key: Any = None, days: int = 30) -> dict[str, Path]:
    """The settings for a signer whose certificate an authority has issued.

    It is valid since yesterday, for this many days; if they are negative, it has expired.
    """
    authority = ec.generate_private_key(ec.SECP256R1())
    key = key or ec.generate_private_key(ec.SECP256R1())
    root = _certificate("Root", authority, "Root", authority, 30, is_authority=True)
    leaf = _certificate(SIGNER, key, "Root", authority, days, is_authority=False)
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(
        leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
    )
    # The older form, which OpenSSL writes too.
    kind = PrivateFormat.PKCS8
    if isinstance(key, ec.EllipticCurvePrivateKey):
        kind = PrivateFormat.TraditionalOpenSSL
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, kind, NoEncryption()))
    return {"c2pa_cert": folder / "cert.pem", "c2pa_key": folder / "key.pem"}


def _certificate(
    subject: str, key: Any, issuer: str, issuer_key: Any, days: int, *, is_authority: bool
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    used_for = {"key_cert_sign", "crl_sign"} if is_authority else {"digital_signature"}
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day * (1 if days > 0 else 1 - days))
        .not_valid_after(now + day * days)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(
            x509.KeyUsage(**{usage: usage in used_for for usage in _USAGES}), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if not is_authority:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(identifier, critical=False)
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )
