"""How far what an edit should have left alone has moved: known changes give known numbers."""

from __future__ import annotations

import numpy as np
import pytest

from step1x_edit.model.request import Pixels
from step1x_edit.pictures.drift import drift

SIDES = (118, 203)  # no multiple of the side of a square


@pytest.fixture
def before() -> Pixels:
    return np.random.default_rng(0).integers(40, 200, (*SIDES, 3), dtype=np.uint8)


def test_a_picture_that_stays_has_not_drifted(before: Pixels) -> None:
    assert drift(before, before.copy()) == 0.0


@pytest.mark.parametrize("levels", [1, 3, -20])
def test_a_shift_of_the_whole_picture_is_its_drift(before: Pixels, levels: int) -> None:
    after = (before.astype(int) + levels).astype(np.uint8)

    assert drift(before, after) == pytest.approx(abs(levels))


def test_a_change_of_two_fifths_counts_for_nothing_and_the_rest_counts(before: Pixels) -> None:
    after = before + np.uint8(2)
    after[:, :80] = 255 - before[:, :80]

    assert drift(before, after) == pytest.approx(2.0)


def test_noise_counts_with_its_mean_level(before: Pixels) -> None:
    noise = np.random.default_rng(1).integers(-4, 5, before.shape)

    measured = drift(before, (before + noise).astype(np.uint8))

    mean = np.abs(noise).mean()  # 2.2
    assert measured == pytest.approx(mean, rel=0.06)  # the squares with less noise are chosen


def test_with_a_mask_all_outside_of_it_counts(before: Pixels) -> None:
    mask = np.zeros(SIDES, np.uint8)
    mask[:, :100] = 1  # almost black, but it may change
    after = before.copy()
    after[:, :100] = 0
    after[:, -40:] += 5

    assert drift(before, after, mask) == pytest.approx(5 * 40 / 103)
    assert drift(before, after, np.full_like(mask, 255)) is None


def test_pictures_of_different_sizes_are_not_compared(before: Pixels) -> None:
    assert drift(before, before[1:]) is None
