"""Our autoencoder against an independent oracle, diffusers', with the same random weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.autoencoder import Attention, Autoencoder, NormSiLU
from step1x_edit.model.config import AutoencoderConfig

NARROW = AutoencoderConfig((8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("has_attention", [True, False])
def test_it_computes_what_the_library_does(has_attention: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        mid_block_add_attention=has_attention,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    config = AutoencoderConfig((8, 8, 16, 16), 1, 16, 4, has_attention)
    ours = Autoencoder(config)
    ours.load_state_dict(theirs.state_dict())
    pixels = 2 * random(2, 3, 48, 64) - 1

    with torch.inference_mode():
        latents = ours.encode(pixels)
        torch.testing.assert_close(latents, theirs.encode(pixels).latent_dist.mode())
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample)


@pytest.mark.parametrize("size", [(64, 64), (72, 40), (64, 200), (136, 208)])
def test_tiles_fade_into_each_other_without_a_seam(size: tuple[int, int]) -> None:
    """With networks for which it makes no difference what lies around a place."""
    autoencoder = Autoencoder(NARROW)
    autoencoder.encoder = nn.AvgPool2d(8)  # type: ignore[assignment]
    autoencoder.decoder = nn.Upsample(scale_factor=8)  # type: ignore[assignment]
    seen: list[tuple[int, ...]] = []
    autoencoder.encoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[2:]))
    )
    pixels = random(1, 3, *size)
    whole = autoencoder.encode(pixels)

    autoencoder.tile = 64

    torch.testing.assert_close(autoencoder.encode(pixels), whole)
    torch.testing.assert_close(
        autoencoder.decode(whole), whole.repeat_interleave(8, 2).repeat_interleave(8, 3)
    )
    assert all(max(sides) <= 64 for sides in seen[1:])
    assert (len(seen) > 2) == (max(size) > 64)


@pytest.mark.parametrize(("mean", "error"), [(0.7, 2e-6), (1000.0, 2e-3)])
def test_the_norm_of_a_large_picture_is_exact_in_the_layout_of_a_cpu(
    mean: float, error: float
) -> None:
    norm = NormSiLU(4, 8, eps=1e-6)
    x = 1.5 * random(1, 8, 512, 512) + mean
    exact = F.silu(F.group_norm(x.double(), 4, eps=1e-6))

    with torch.inference_mode():
        normed = norm(x.contiguous(memory_format=torch.channels_last))

    assert normed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normed.double(), exact, atol=error, rtol=0)


def test_attention_normalises_exactly_in_the_layout_of_a_cpu() -> None:
    attention = Attention(8, 4)
    x = random(1, 8, 64, 64) + 1000
    exact = F.group_norm(x.double(), 4, eps=1e-6).float()
    tokens = exact.flatten(2).transpose(1, 2)
    q, k, v = (to(tokens) for to in (attention.to_q, attention.to_k, attention.to_v))
    attended = attention.to_out[0](F.scaled_dot_product_attention(q, k, v))

    with torch.inference_mode():
        found = attention(x.contiguous(memory_format=torch.channels_last)) - x

    expected = attended.transpose(1, 2).reshape(x.shape).detach()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_training_and_editing_agree() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(NARROW)
    pixels = 2 * random(2, 3, 64, 48) - 1

    trained = autoencoder.decode(autoencoder.encode(pixels))
    with torch.inference_mode():
        edited = autoencoder.decode(autoencoder.encode(pixels))

    trained.sum().backward()
    torch.testing.assert_close(edited, trained.detach(), atol=1e-5, rtol=1e-5)
