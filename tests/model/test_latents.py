import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step1x_edit.model.latents import (
    draw_noise,
    image_position_ids,
    pack,
    position_ids,
    unpack,
)
from step1x_edit.model.sizes import fit_size


@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    channels=st.integers(1, 5),
    batch=st.integers(1, 3),
)
def test_unpack_undoes_pack(rows: int, cols: int, channels: int, batch: int) -> None:
    latents = torch.randn(batch, channels, 2 * rows, 2 * cols)

    tokens = pack(latents)

    assert tokens.shape == (batch, rows * cols, 4 * channels)
    assert torch.equal(unpack(tokens, rows, cols), latents)


def test_a_token_holds_one_patch() -> None:
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)

    tokens = pack(latents)

    patch = latents[0, :, 2:4, 4:6]  # second row, third column
    assert tokens[0, 1 * 3 + 2].tolist() == patch.flatten().tolist()


def test_odd_latents_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="3 x 4"):
        pack(torch.zeros(1, 1, 3, 4))


def test_reference_tokens_are_offset_from_the_target() -> None:
    ids = image_position_ids(2, 3, (1.0, 1.0, 1.0))

    assert ids[:6].tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert torch.equal(ids[6:], ids[:6] + 1)


def test_position_ids_take_a_fractional_offset() -> None:
    assert position_ids(1, 2, (0.0, 0.5, -3.0)).tolist() == [[0, 0.5, -3], [0, 0.5, -2]]


@pytest.mark.parametrize(
    ("width", "height", "size_level", "multiple", "fitted"),
    [
        (512, 512, 512, 16, (512, 512)),
        (1, 1, 512, 16, (512, 512)),
        (640, 480, 512, 16, (592, 432)),
        (480, 640, 512, 16, (432, 592)),
        (3228, 942, 1024, 16, (1888, 544)),
        (739, 741, 1024, 16, (1024, 1024)),
        (640, 480, 512, 32, (576, 416)),
    ],
)
def test_fitted_size(
    width: int, height: int, size_level: int, multiple: int, fitted: tuple[int, int]
) -> None:
    assert fit_size(width, height, size_level, multiple) == fitted


def test_a_strip_too_narrow_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="100000 x 10"):
        fit_size(100_000, 10, 512, 16)


def test_noise_depends_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = draw_noise((1, 4, 6), seed=7)
    torch.manual_seed(2)

    assert torch.equal(draw_noise((1, 4, 6), seed=7), first)
    assert not torch.equal(draw_noise((1, 4, 6), seed=8), first)
