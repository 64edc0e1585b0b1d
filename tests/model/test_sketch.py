"""Previews by a linear layer: near to what the demo's own decoder shows, for any picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from demo_data import HELD_OUT_PHOTOS, load_photo
from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.sketch import Pairs, Sketch, chart

SIDE = 256


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return read_checkpoint().pipeline.vae


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """(1, 3, H, W), 0 to 255."""
    pixels = Image.fromarray((load_photo(*HELD_OUT_PHOTOS["coffee"]) * 255).astype(np.uint8))
    return torch.from_numpy(np.array(pixels.resize((SIDE, SIDE)))).permute(2, 0, 1)[None].float()


@pytest.fixture(scope="module")
def taught(vae: Autoencoder) -> Pairs:
    """What the chart teaches."""
    return pairs_of(vae, chart())


def latents_of(vae: Autoencoder, pixels: Tensor) -> Tensor:
    return vae.encode(pixels / 127.5 - 1)


@torch.inference_mode()
def pairs_of(vae: Autoencoder, pixels: Tensor) -> Pairs:
    return Pairs.of(latents_of(vae, pixels), pixels)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4))


def likeness(sketch: Sketch, vae: Autoencoder, edited: Tensor) -> float:
    """How near a sketch of an edited picture comes to what the decoder makes of it, in dB."""
    latents = latents_of(vae, edited)
    return psnr(sketch(latents, SIDE, SIDE), vae.decode(latents))


@torch.inference_mode()
def test_a_sketch_comes_near_to_the_decoder_for_pictures_that_it_was_not_fitted_to(
    vae: Autoencoder, photo: Tensor, taught: Pairs
) -> None:
    sketch = (pairs_of(vae, photo) + taught).fit()

    assert likeness(sketch, vae, photo) > 27
    for edited in (255 - photo, photo.flip(1), photo * 0.4):
        assert likeness(sketch, vae, edited) > 24


@torch.inference_mode()
@pytest.mark.parametrize("before", ["grey", "white"])
def test_the_chart_teaches_the_colours_that_a_picture_lacks(
    vae: Autoencoder, photo: Tensor, taught: Pairs, before: str
) -> None:
    source = photo.mean(1, keepdim=True).expand(-1, 3, -1, -1) if before == "grey" else photo * 0
    red = photo * torch.tensor([1.0, 0.3, 0.3]).view(1, 3, 1, 1)
    alone = pairs_of(vae, source)

    assert likeness((alone + taught).fit(), vae, red) > 20
    assert likeness(alone.fit(), vae, red) < 17


@torch.inference_mode()
def test_a_picture_from_words_is_shown_by_what_the_chart_teaches(
    vae: Autoencoder, photo: Tensor, taught: Pairs
) -> None:
    assert likeness(taught.fit(), vae, photo) > 18


def test_a_linear_decoder_is_found_exactly() -> None:
    """Latents that are the pixels themselves, at an eighth of the size."""
    pixels = chart()
    latents = torch.nn.functional.pixel_unshuffle(pixels / 127.5 - 1, 8)[:, ::64]  # (1, 3, 32, 32)

    sketch = Pairs.of(latents, pixels).fit()

    shown = sketch(latents, SIDE, SIDE)[:, :, ::8, ::8]
    assert torch.allclose(shown, latents, atol=0.05)


def test_pixels_come_in_the_size_that_is_asked_for() -> None:
    sketch = Pairs.of(torch.randn(1, 2, 4, 6), torch.rand(1, 3, 64, 96) * 255).fit()

    assert sketch(torch.randn(1, 2, 4, 6), 64, 96).shape == (1, 3, 64, 96)


def test_the_chart_is_always_the_same_and_has_all_colours() -> None:
    first = chart()
    chart.cache_clear()

    assert torch.allclose(chart(), first, atol=0.01)  # sums may be rounded in another order
    assert first.min() == 0
    assert first.max() == 255
