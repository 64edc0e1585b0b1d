"""The phrase grammar keeps its promises to the training of the demo's text encoder."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import demo_prompts  # noqa: E402
import demo_words_zh  # noqa: E402
from demo_prompts import (  # noqa: E402
    HELD_OUT_WORDS,
    LABELS,
    LANGUAGES,
    LEXICONS,
    MAX_LENGTH,
    Language,
    corpus,
    describe,
    evaluation_set,
    held_out_words_in,
    sample_prompt,
)


def test_the_same_seed_gives_the_same_corpus_in_every_process() -> None:
    code = "import demo_prompts; print(demo_prompts.corpus(3, seed=5))"
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONIOENCODING": "utf-8"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SCRIPTS,
        env=environment,
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    assert elsewhere.stdout.strip() == str(corpus(3, seed=5))


def test_another_seed_gives_another_corpus() -> None:
    assert corpus(3, seed=5) != corpus(3, seed=6)


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_phrases_hold_no_held_out_word(language: Language) -> None:
    rng = random.Random(1)
    for label in LABELS:
        for _ in range(15):
            prompt = sample_prompt(label, rng, held_out=False, language=language)
            words = demo_prompts.english_words(prompt) if language == "en" else prompt.casefold()
            assert not [word for word in HELD_OUT_WORDS[language] if word in words], prompt


def test_every_evaluation_phrase_holds_a_held_out_word() -> None:
    for prompt, _ in evaluation_set(8, seed=3):
        assert any(held_out_words_in(prompt, language) for language in LANGUAGES), prompt


def test_the_evaluation_set_asks_for_every_label_equally_often() -> None:
    asked = [label for _, label in evaluation_set(4, seed=3)]
    assert {label: asked.count(label) for label in LABELS} == dict.fromkeys(LABELS, 4)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_label_has_many_phrases_in_every_language(language: Language) -> None:
    rng = random.Random(2)
    for label in LABELS:
        phrases = {sample_prompt(label, rng, language=language) for _ in range(260)}
        assert len(phrases) >= 200, label


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_tenth_of_the_words_is_held_out_and_no_label_is_left_without_cues(
    language: Language,
) -> None:
    sizes = describe()[language]
    assert isinstance(sizes["words"], int)
    assert isinstance(sizes["held_out_words"], int)
    assert 0.08 <= sizes["held_out_words"] / sizes["words"] <= 0.12
    known = demo_prompts.known_lexicon(language)
    for label in LABELS:
        every = sum(map(len, LEXICONS[language].cues[label].values()))
        assert sum(map(len, known.cues[label].values())) >= 0.7 * every, label


@pytest.mark.parametrize(
    ("phrase", "label"),
    [
        ("change to night scene", "night"),
        ("enhance quality", "vivid"),
        ("add a red hat", "unknown"),
        ("add sunglasses", "unknown"),
        ("add a hat", "unknown"),
    ],
)
def test_the_phrases_users_are_shown_first_are_trained_on(phrase: str, label: str) -> None:
    cues = demo_prompts.known_lexicon("en").cues
    homes = {name for name, tables in cues.items() if any(phrase in t for t in tables.values())}
    assert homes == {label}


def test_no_phrase_is_a_cue_of_two_edits() -> None:
    for language, lexicon in LEXICONS.items():
        homes: dict[str, str] = {}
        for label, tables in lexicon.cues.items():
            if label == "unknown" or label in demo_prompts.TINTS:
                continue
            for entry in {entry for entries in tables.values() for entry in entries}:
                assert homes.setdefault(entry, label) == label, (language, entry)


def test_colours_of_objects_are_unknown_edits() -> None:
    rng = random.Random(4)
    phrases = [sample_prompt("unknown", rng, language="en").casefold() for _ in range(600)]
    for colour in ("red", "green", "blue", "pink", "purple"):
        assert any(colour in phrase.split() for phrase in phrases), colour


def test_the_empty_prompt_leaves_the_picture_as_it_is() -> None:
    empty = {label for prompt, label in corpus(60, seed=1) if not prompt}
    assert empty == {"identity"}


def test_traditional_phrases_hold_no_simplified_character() -> None:
    rng = random.Random(6)
    simplified = set(demo_words_zh.SIMPLIFIED_CHARACTERS)
    for label in LABELS:
        for _ in range(20):
            prompt = sample_prompt(label, rng, held_out=None, language="zh-hant")
            assert not simplified.intersection(prompt), prompt


@pytest.mark.parametrize("language", LANGUAGES)
def test_phrases_are_short_enough_for_the_text_encoder(language: Language) -> None:
    rng = random.Random(7)
    lengths = [len(sample_prompt(label, rng, language=language)) for label in LABELS * 10]
    too_long = sum(length > MAX_LENGTH[language] + 4 for length in lengths)  # 4: noise on top
    assert too_long <= 0.02 * len(lengths)
