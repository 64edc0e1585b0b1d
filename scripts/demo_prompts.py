"""The phrase grammar that the demo checkpoint's text encoder is trained on.

Every phrase is drawn from tables of words in four languages (`demo_words_en`, `demo_words_zh`,
`demo_words_ja`): a cue of the edit ("gloomy", "a pencil sketch", "take the colour out of") goes
into a frame for its part of speech ("make {obj} {adj}"), the frame's slots are filled from further
tables, a polite form may be put around it, and a little noise (case, punctuation, typos) on top.

The format of the tables: alternatives are separated by ``|``, ``{name}`` is a slot filled from the
table of that name. Chinese and Japanese tables have a space between words, which is removed.

A tenth of the words is held out by a hash. `sample_prompt` with ``held_out=False`` never uses one,
with ``True`` always uses at least one, so that accuracy on unseen wording can be measured.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

import demo_words_en
import demo_words_ja
import demo_words_zh

Language = Literal["en", "zh-hans", "zh-hant", "ja"]
LANGUAGES: tuple[Language, ...] = ("en", "zh-hans", "zh-hant", "ja")
LANGUAGE_SHARES = (0.50, 0.20, 0.12, 0.18)

LABELS: tuple[str, ...] = (
    "identity",
    "unknown",
    "bw",
    "sepia",
    "invert",
    "bright",
    "dark",
    "night",
    "warm",
    "cool",
    "contrast",
    "vivid",
    "faded",
    "fog",
    "red",
    "green",
    "blue",
    "pink",
    "purple",
    "swap",
    "autumn",
    "blur",
    "sketch",
    "thermal",
    "cyberpunk",
    "stencil",
    "mosaic",
    "painting",
)
TINTS = ("red", "green", "blue", "pink", "purple")

# What the demo cannot do is unlimited, so the corpus contains more of it.
UNKNOWN_WEIGHT = 5

HELD_OUT_SHARE = 0.1
# The share of its entries that a table may lose to one held-out word, and to all of them.
MAX_LOSS_PER_WORD = 0.05
MAX_LOSS = 0.25

TWO_CUES = 0.3
EMPTY_PROMPT = 0.08
MAX_LENGTH: Mapping[Language, int] = {"en": 70, "zh-hans": 22, "zh-hant": 22, "ja": 26}

Tables = dict[str, tuple[str, ...]]
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Lexicon:
    """All tables of one language."""

    frames: Tables
    common: Tables
    cues: dict[str, Tables]
    polite: tuple[str, ...]
    join: tuple[str, ...]
    grammar_words: frozenset[str]

    def tables(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every table with a name that states the stratum of its words: cues are named by label."""
        yield "polite", self.polite
        for name, entries in self.frames.items():
            if name not in ("phrase.say", "act.do"):
                yield f"frame {name.split('.')[0]}", entries
        for name, entries in self.common.items():
            yield f"common {name}", entries
        for label, tables in self.cues.items():
            if label == "unknown":
                for name, entries in tables.items():
                    yield f"unknown {name}", entries
            else:
                yield label, tuple(entry for entries in tables.values() for entry in entries)


def sample_prompt(
    label: str,
    rng: random.Random,
    held_out: bool | None = False,
    language: Language | None = None,
) -> str:
    """One phrase that asks for `label`; without a language, one is drawn from the usual mix."""
    if label == "identity" and not held_out and rng.random() < EMPTY_PROMPT:
        return ""
    language = language or rng.choices(LANGUAGES, LANGUAGE_SHARES)[0]
    writer = _writer(language, label, held_out is not False)
    while True:
        prompt = writer.write(rng)
        if held_out is None or bool(held_out_words_in(prompt, language)) == held_out:
            return prompt


def corpus(n_per_label: int, seed: int, held_out: bool | None = False) -> list[tuple[str, str]]:
    """Shuffled (prompt, label) pairs for training; `unknown` comes `UNKNOWN_WEIGHT` times as often.

    ``held_out=None`` uses every word, for a checkpoint that is released after the measurement.
    """
    rng = random.Random(seed)
    pairs = [
        (sample_prompt(label, rng, held_out), label)
        for label in LABELS
        for _ in range(n_per_label * (UNKNOWN_WEIGHT if label == "unknown" else 1))
    ]
    rng.shuffle(pairs)
    return pairs


def evaluation_set(n_per_label: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, label) pairs, each with at least one word that `corpus` never uses."""
    rng = random.Random(seed)
    return [
        (sample_prompt(label, rng, held_out=True), label)
        for label in LABELS
        for _ in range(n_per_label)
    ]


def held_out_words_in(prompt: str, language: Language) -> set[str]:
    """The held-out words that occur in a phrase."""
    if language == "en":
        return set(HELD_OUT_WORDS["en"].intersection(english_words(prompt)))
    return set(_held_out_pattern().findall(prompt.casefold()))


def describe() -> dict[str, dict[str, object]]:
    """Sizes of the grammar per language, for the model card."""
    return {
        language: {
            "words": len(words(language)),
            "held_out_words": len(HELD_OUT_WORDS[language] & words(language)),
            "frames": sum(len(entries) for entries in lexicon.frames.values()),
            "polite_forms": len(set(lexicon.polite)),
            "cues": {
                label: sum(len(set(entries)) for entries in lexicon.cues[label].values())
                for label in LABELS
            },
        }
        for language, lexicon in LEXICONS.items()
    }


# --- writing one phrase ---------------------------------------------------------------------------


class Writer:
    """Writes phrases for one label in one language from the given tables."""

    def __init__(self, language: Language, lexicon: Lexicon, cues: Tables) -> None:
        self._language = language
        self._tables = {**lexicon.common, **lexicon.frames, **cues}
        self._polite = lexicon.polite
        self._join = lexicon.join
        # A part of speech is as likely as the square root of its number of cues.
        frames = [(name, name.split(".")[0]) for name in lexicon.frames]
        self._frames = [name for name, role in frames if role in cues]
        self._weights = [
            len(set(cues[role])) ** 0.5 * (1.0 if role in ("act", "phrase") else 0.5)
            for _, role in frames
            if role in cues
        ]

    def write(self, rng: random.Random) -> str:
        """One finished phrase, of at most the language's length if possible."""
        for _ in range(20):
            if rng.random() < TWO_CUES:
                two = {"a": self._core(rng), "b": self._short(rng)}
                text = self._expand(rng.choice(self._join), rng, **two)
            else:
                text = self._core(rng)
            prompt = _finish(text, self._language)
            if len(prompt) <= MAX_LENGTH[self._language]:
                break
        return _with_noise(prompt, self._language, rng)

    def _core(self, rng: random.Random) -> str:
        frame = self._frame(rng)
        text = self._expand(f"{{{frame}}}", rng)
        if frame.endswith(".do"):
            text = self._expand(rng.choice(self._polite), rng, do=text)
        return text

    def _short(self, rng: random.Random) -> str:
        """A second cue, without a polite form."""
        return self._expand(f"{{{self._frame(rng)}}}", rng)

    def _frame(self, rng: random.Random) -> str:
        return rng.choices(self._frames, self._weights)[0]

    def _expand(self, template: str, rng: random.Random, **given: str) -> str:
        def fill(slot: re.Match[str]) -> str:
            name = slot[1]
            if name in given:
                return given[name]
            if name in NONSENSE:
                return NONSENSE[name](rng)
            return self._expand(rng.choice(self._tables[name]), rng)

        return SLOT_OR_FRAME.sub(fill, template)


SLOT_OR_FRAME = re.compile(r"\{([\w.]+)\}")


def _letters(alphabet: str, shortest: int, longest: int) -> Callable[[random.Random], str]:
    def write(rng: random.Random) -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(shortest, longest)))

    return write


NONSENSE: Mapping[str, Callable[[random.Random], str]] = {
    "noise": _letters("abcdefghijklmnopqrstuvwxyzaeiouaeiou0123", 2, 9),
    "hanzi": _letters("的一是了我不人在他有上到大地子中你生年就那和要她出也得自以", 2, 6),
    "kana": _letters("あいうえおかきくけこさしすせそたちつてとなにのはひふまみむもやらり", 2, 6),
}

# An "a" before a vowel sound.
ARTICLE = re.compile(r"\b([aA])(?= (?!uni|ufo|one)[aeiou])")
# Spaces that separate words in the tables of a language without spaces.
TABLE_SPACE = re.compile(r"(?<![a-zA-Z0-9]) +| +(?![a-zA-Z0-9])")


def _finish(text: str, language: Language) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    if language == "en":
        return ARTICLE.sub(r"\1n", text)
    return TABLE_SPACE.sub("", text)


# --- noise ----------------------------------------------------------------------------------------

ENGLISH_ENDINGS = ("", "", "", "", "", "", "", ".", ".", ".", "!", "...", "!!", "?", " :)", " ,")
ASIAN_ENDINGS = ("", "", "", "", "", "", "。", "。", "！", "!", ".", "～", "…", "？", "!!")


def _with_noise(prompt: str, language: Language, rng: random.Random) -> str:
    if language == "en":
        prompt = _american(prompt) if rng.random() < 0.6 else prompt
        prompt = _with_typo(prompt, rng) if rng.random() < 0.10 else prompt
        prompt = prompt.replace(" ", "", 1 + rng.randrange(3)) if rng.random() < 0.02 else prompt
        prompt = prompt.replace("'", "") if rng.random() < 0.2 else prompt
        return _with_case(prompt, rng) + rng.choice(ENGLISH_ENDINGS)
    prompt = prompt.replace("，", rng.choice(("，", "，", ",", " ", "")))
    prompt = prompt.replace("、", rng.choice(("、", "、", "，", " ", "")))
    prompt = _with_slip(prompt, rng) if rng.random() < 0.05 else prompt
    return prompt + rng.choice(ASIAN_ENDINGS)


def _american(text: str) -> str:
    text = text.replace("colour", "color").replace("grey", "gray").replace("Colour", "Color")
    return re.sub(r"(?<=[a-z]{3})is(e|ed|ing|ation)\b", _z_spelling, text)


# Words in -ise that are spelt so on both sides of the Atlantic.
ALWAYS_ISE = re.compile(r"(noise|precise|likewise|raise|rise|wise|otherwise|turquoise|tortoise)$")


def _z_spelling(ending: re.Match[str]) -> str:
    stem = re.search(r"[a-z]*$", ending.string[: ending.start()])
    word = (stem[0] if stem else "") + "ise"
    return ending[0] if ALWAYS_ISE.search(word) else f"iz{ending[1]}"


def _with_case(text: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.62:
        return text
    if draw < 0.92:
        return text[:1].upper() + text[1:]
    return text.upper() if draw < 0.96 else text.title()


def _with_typo(text: str, rng: random.Random) -> str:
    """Drops, doubles or swaps letters inside one of the longer words."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long_words:
        return text
    index = rng.choice(long_words)
    word = words[index]
    at = rng.randrange(1, len(word) - 1)
    words[index] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        )
    )
    return " ".join(words)


def _with_slip(text: str, rng: random.Random) -> str:
    """Leaves out a particle or doubles a character, as happens with an input method."""
    particles = [i for i, character in enumerate(text) if character in "把的一下得をのには"]
    if particles and len(text) > 5:
        at = rng.choice(particles)
        return text[:at] + text[at + 1 :]
    at = rng.randrange(len(text)) if text else 0
    return text[:at] + text[at : at + 1] + text[at:]


# --- tables ---------------------------------------------------------------------------------------


def _entries(table: str) -> tuple[str, ...]:
    return tuple(entry for entry in (" ".join(part.split()) for part in table.split("|")) if entry)


def _tables(raw: Mapping[str, str]) -> Tables:
    return {name: _entries(table) for name, table in raw.items()}


def _lexicon(
    frames: Mapping[str, str],
    common: Mapping[str, str],
    cues: Mapping[str, Mapping[str, str]],
    tint: Mapping[str, str],
    unknown: Mapping[str, str],
    polite: str,
    join: str,
    grammar_words: str,
) -> Lexicon:
    all_cues = {label: _tables(raw) for label, raw in cues.items()}
    for label in TINTS:
        shared = _tables(tint)
        own = all_cues[label]
        all_cues[label] = {
            name: shared.get(name, ()) + own.get(name, ()) for name in {**shared, **own}
        }
    # A local edit ("make the sky darker") is not possible although its words are known.
    borrowed = {
        f"edit_{role}": tuple(
            entry
            for tables in all_cues.values()
            for entry in tables.get(role, ())
            if "{" not in entry
        )
        for role in ("adj", "cmp", "ku")
    }
    all_cues["unknown"] = {
        **_tables(unknown),
        **{name: entries for name, entries in borrowed.items() if entries},
    }
    return Lexicon(
        frames=_tables(frames),
        common=_tables(common),
        cues=all_cues,
        polite=_entries(polite),
        join=_entries(join),
        grammar_words=frozenset(grammar_words.split()),
    )


def _traditional(text: str) -> str:
    for simplified, traditional in demo_words_zh.TRADITIONAL_WORDS.items():
        text = text.replace(simplified, traditional)
    return text.translate(TRADITIONAL)


TRADITIONAL = str.maketrans(
    demo_words_zh.SIMPLIFIED_CHARACTERS, demo_words_zh.TRADITIONAL_CHARACTERS
)


def _read(
    module: object, convert: Callable[[str], str] = str, extra: Mapping[str, str] | None = None
) -> Lexicon:
    tables = vars(module)

    def converted(raw: Mapping[str, str]) -> dict[str, str]:
        return {name: convert(table) for name, table in raw.items()}

    common = converted(tables["COMMON"])
    for name, table in (extra or {}).items():
        common[name] += "|" + table
    return _lexicon(
        frames=converted(tables["FRAMES"]),
        common=common,
        cues={label: converted(raw) for label, raw in tables["CUES"].items()},
        tint=converted(tables["TINT"]),
        unknown=converted(tables["UNKNOWN"]),
        polite=convert(tables["POLITE"]),
        join=convert(tables["JOIN"]),
        grammar_words=convert(tables["GRAMMAR_WORDS"]),
    )


LEXICONS: Mapping[Language, Lexicon] = {
    "en": _read(demo_words_en),
    "zh-hans": _read(demo_words_zh),
    "zh-hant": _read(demo_words_zh, _traditional, demo_words_zh.TRADITIONAL_EXTRA),
    "ja": _read(demo_words_ja),
}


@cache
def _writer(language: Language, label: str, with_held_out_words: bool) -> Writer:
    lexicon = LEXICONS[language] if with_held_out_words else known_lexicon(language)
    return Writer(language, lexicon, lexicon.cues[label])


@cache
def known_lexicon(language: Language) -> Lexicon:
    """The tables without the entries that hold a held-out word."""
    lexicon = LEXICONS[language]

    def known(entries: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            entry for entry in entries if not held_out_words_in(_bare(entry, language), language)
        )

    def known_tables(tables: Tables) -> Tables:
        return {name: left for name, entries in tables.items() if (left := known(entries))}

    return Lexicon(
        frames=known_tables(lexicon.frames),
        common=known_tables(lexicon.common),
        cues={label: known_tables(tables) for label, tables in lexicon.cues.items()},
        polite=known(lexicon.polite),
        join=lexicon.join,
        grammar_words=lexicon.grammar_words,
    )


# --- the held-out words ---------------------------------------------------------------------------


def english_words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", _american(text.casefold()))


def _bare(entry: str, language: Language) -> str:
    """An entry as it appears in a phrase, with a bar in place of each slot."""
    text = SLOT_OR_FRAME.sub("|", entry).casefold()
    return text if language == "en" else text.replace(" ", "")


def _entry_words(entry: str, language: Language) -> set[str]:
    """The words of an entry that may be held out: no grammar words, no single characters."""
    text = SLOT_OR_FRAME.sub(" ", entry).casefold()
    words = english_words(text) if language == "en" else re.findall(r"[^\s，、。！＆+;,.-]+", text)
    return {word for word in words if len(word) > 1} - LEXICONS[language].grammar_words


def words(language: Language) -> set[str]:
    """Every word of a language's tables that can be held out."""
    return {
        word
        for _, entries in LEXICONS[language].tables()
        for entry in entries
        for word in _entry_words(entry, language)
    }


def _choose_held_out(languages: tuple[Language, ...]) -> frozenset[str]:
    """A tenth of the words of each stratum, in the order of their hashes.

    Words that carry more than `MAX_LOSS_PER_WORD` of some table are skipped (nobody can guess
    "mosaic" from the rest of English). Languages that share characters are split together;
    otherwise a word held out in one would be learnt from the other.
    """
    tables = [
        _Table(_bare(entry, language) for entry in entries)
        for language in languages
        for _, entries in LEXICONS[language].tables()
    ]
    chosen: set[str] = set()
    for words in _strata(languages):
        quota = round(len(words) * HELD_OUT_SHARE)
        for word in sorted(words, key=lambda word: sha256(word.encode()).digest()):
            if quota == 0:
                break
            forms = {word, _traditional(word)}
            losses = [table.entries_with(forms) for table in tables]
            if all(map(_Table.can_spare, tables, losses)):
                for table, loss in zip(tables, losses, strict=True):
                    table.lost |= loss
                chosen |= forms
                quota -= 1
    return frozenset(chosen)


def _strata(languages: tuple[Language, ...]) -> list[set[str]]:
    """The words by language and table; those of several tables form a separate stratum."""
    homes: dict[str, str] = {}
    for language in languages:
        if language == "zh-hant":
            continue  # follows the choice made for the simplified words
        for name, entries in LEXICONS[language].tables():
            for entry in entries:
                for word in _entry_words(entry, language):
                    home = homes.setdefault(word, f"{language} {name}")
                    if home != f"{language} {name}":
                        homes[word] = f"{home.split()[0]} shared"
    strata: dict[str, set[str]] = defaultdict(set)
    for word, home in homes.items():
        strata[home].add(word)
    return [strata[home] for home in sorted(strata)]


class _Table:
    """The entries of one table and those that the held-out words have removed so far."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = sorted(set(entries))
        self._text = "\n".join(self._entries)
        self.lost: set[int] = set()

    def entries_with(self, words: set[str]) -> set[int]:
        return {
            i
            for word in words
            if word in self._text
            for i, entry in enumerate(self._entries)
            if word in entry and (not word.isascii() or word in english_words(entry))
        }

    def can_spare(self, loss: set[int]) -> bool:
        if not loss:
            return True
        size = len(self._entries)
        return len(loss) <= max(2.0, MAX_LOSS_PER_WORD * size) and (
            len(self.lost | loss) <= max(1.0, MAX_LOSS * size) and len(self.lost | loss) < size
        )


def choose_held_out() -> dict[str, list[str]]:
    """A fresh split of the words; `python scripts/demo_prompts.py` writes it to `HELD_OUT_FILE`."""
    return {
        "en": sorted(_choose_held_out(("en",))),
        "zh, ja": sorted(_choose_held_out(("zh-hans", "zh-hant", "ja"))),
    }


def _read_held_out() -> dict[Language, frozenset[str]]:
    split = {
        key: frozenset(words) for key, words in json.loads(HELD_OUT_FILE.read_text("utf-8")).items()
    }
    asian = split["zh, ja"]
    return {"en": split["en"], "zh-hans": asian, "zh-hant": asian, "ja": asian}


HELD_OUT_FILE = Path(__file__).with_name("demo_held_out.json")
"""The split, frozen: the grammar can grow without changing it for a checkpoint already trained."""

HELD_OUT_WORDS: Mapping[Language, frozenset[str]] = _read_held_out()


@cache
def _held_out_pattern() -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(HELD_OUT_WORDS["ja"], key=len, reverse=True))))


if __name__ == "__main__":
    HELD_OUT_FILE.write_text(json.dumps(choose_held_out(), ensure_ascii=False, indent=0), "utf-8")
