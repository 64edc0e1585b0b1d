"""Provenance in XMP: that a model made the picture, which one, and who is credited.

The vocabulary is that of the IPTC, which search engines, agencies and other editors read. A packet
has no date, id or version, so equal pictures get equal packets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from step1x_edit.schemas.requests import GenerationRecord, Record

GENERATED: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EDITED: Final = (
    "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
)

_RDF: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC: Final = "http://purl.org/dc/elements/1.1/"
RIGHTS: Final = "http://ns.adobe.com/xap/1.0/rights/"
PHOTOSHOP: Final = "http://ns.adobe.com/photoshop/1.0/"
_XMP: Final = "http://ns.adobe.com/xap/1.0/"
_IPTC_EXTENSION: Final = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
SOURCE_TYPE: Final = f"{{{_IPTC_EXTENSION}}}DigitalSourceType"

_MAX_XMP_BYTES: Final = 2**20
_NOT_IN_XML: Final = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# The parser copies the name of a namespace for each name in it. Those in use have some 50 letters.
_LONG_NAMESPACE: Final = re.compile(
    r"""xmlns(?:[^\s=]{101}|[^\s=]{0,100}\s*=\s*(?:"[^"]{200}|'[^']{200}))"""
)
_MAX_MODEL: Final = 200  # characters: with the longest credit it must fit into one JPEG segment


@dataclass(frozen=True)
class Credit:
    """The author of a picture and its terms of use."""

    creators: tuple[str, ...] = ()
    rights: str = ""
    usage_terms: str = ""
    statement_url: str = ""
    credit: str = ""


def source_type_of(record: Record, before: str) -> str:
    """The IPTC's name for how a result came to be; `before` is the name that its input has.

    The edit of a picture that a model has made is still made by a model: nothing in it was
    captured or drawn.
    """
    was_generated = _last_part(before) == _last_part(GENERATED)
    return GENERATED if was_generated or isinstance(record, GenerationRecord) else EDITED


def _last_part(source_type: str) -> str:
    return source_type.rpartition("/")[2]


def texts_of(packet: bytes | str | None) -> dict[str, list[str]]:
    """The texts of each property of an XMP packet, by its full name; damaged XMP counts as none.

    A packet that could grow without bound is not read: one with a document type, which XMP does not
    have, for its entities, and one with a very long name of a namespace.
    Descriptions inside of properties are about other things, such as an ingredient.
    """
    if not packet or len(packet) > _MAX_XMP_BYTES:
        return {}
    try:
        text = packet if isinstance(packet, str) else packet.rstrip(b"\0 ").decode("utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text or _LONG_NAMESPACE.search(text):
            return {}
        root = ElementTree.fromstring(text)  # noqa: S314 - without a document type, see above
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError):
        return {}
    rdf = next(root.iter(f"{{{_RDF}}}RDF"), None)
    if rdf is None:
        return {}
    found: dict[str, list[str]] = {}
    for description in rdf.findall(f"{{{_RDF}}}Description"):
        for name, value in description.items():
            found.setdefault(name, []).append(value)
        for element in description:
            items = [item.text or "" for item in element.iter(f"{{{_RDF}}}li")]
            found.setdefault(element.tag, []).extend(items or [element.text or ""])
    return found


def packet_of(credit: Credit, record: Record | None, before: str) -> bytes | None:
    """The XMP of a result; without a record, only what its input said. None if there is none."""
    properties = [
        *([_source_type(before)] if record is None else _mark(record, before)),
        _listed("dc:creator", "Seq", "<rdf:li>", credit.creators),
        _listed("dc:rights", "Alt", _DEFAULT_LANGUAGE, (credit.rights,)),
        _listed("xmpRights:UsageTerms", "Alt", _DEFAULT_LANGUAGE, (credit.usage_terms,)),
        _simple("xmpRights:WebStatement", credit.statement_url),
        _simple("photoshop:Credit", credit.credit),
    ]
    if not any(properties):
        return None
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        f'<rdf:RDF xmlns:rdf="{_RDF}">\n'
        f'<rdf:Description rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC_EXTENSION}" '
        f'xmlns:dc="{DC}" xmlns:xmpRights="{RIGHTS}" xmlns:photoshop="{PHOTOSHOP}">\n'
        f"{''.join(properties)}"
        "</rdf:Description>\n</rdf:RDF>\n</x:xmpmeta>\n"
        '<?xpacket end="r"?>'
    ).encode()


def _mark(record: Record, before: str) -> list[str]:
    return [
        _source_type(source_type_of(record, before)),
        _simple("Iptc4xmpExt:AISystemUsed", record.model[:_MAX_MODEL]),
        _simple("xmp:CreatorTool", record.software),
    ]


def _source_type(name: str) -> str:
    return _simple("Iptc4xmpExt:DigitalSourceType", name)


_DEFAULT_LANGUAGE: Final = '<rdf:li xml:lang="x-default">'


def _listed(name: str, kind: str, item: str, texts: tuple[str, ...]) -> str:
    items = "".join(f"{item}{escape(_printable(text))}</rdf:li>" for text in texts if text)
    return f"<{name}><rdf:{kind}>{items}</rdf:{kind}></{name}>\n" if items else ""


def _simple(name: str, text: str) -> str:
    return f"<{name}>{escape(_printable(text))}</{name}>\n" if text else ""


def _printable(text: str) -> str:
    """Text without the characters that XML does not allow."""
    return _NOT_IN_XML.sub("", text)
