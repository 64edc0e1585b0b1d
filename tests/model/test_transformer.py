import dataclasses

import pytest
import torch
from torch import Tensor

from step1x_edit.model.blocks import Layout
from step1x_edit.model.config import V1_0, V1_1, V1_2, ModelConfig
from step1x_edit.model.connector import attention_mask
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.transformer import QuotedText, Transformer
from tiny import TINY

CONFIG = TINY.transformer
B, L, VALID = 2, 7, (7, 4)
IDS = image_position_ids(2, 3, TINY.reference_offset)
N = len(IDS)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.fixture
def prompt() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(L) < torch.tensor(VALID).unsqueeze(1)).long()
    return torch.randn(B, L, CONFIG.connector.in_features) * mask.unsqueeze(-1), mask


@pytest.fixture
def img() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(B, N, CONFIG.in_channels)


@torch.no_grad()
def test_prologue_for_all_timesteps_equals_one_forward_per_timestep(
    transformer: Transformer, prompt: tuple[Tensor, Tensor], img: Tensor
) -> None:
    timesteps = torch.tensor([1.0, 0.6, 0.05])

    prologue = transformer.prologue(*prompt, timesteps)

    assert len(prologue) == 3
    layout = Layout(transformer.rope(IDS, L), L)
    for i, t in enumerate(timesteps):
        alone = transformer(img, IDS, *prompt, t.expand(B))
        torch.testing.assert_close(transformer.core(img, prologue[i], layout), alone)
    assert not torch.allclose(prologue[0].final, prologue[1].final)


@torch.no_grad()
def test_padded_text_rows_are_identical(
    transformer: Transformer, prompt: tuple[Tensor, Tensor]
) -> None:
    txt = transformer.prologue(*prompt, torch.tensor([0.8, 0.2])).txt

    padded = txt[:, 1, VALID[1] :]
    torch.testing.assert_close(padded, padded[:, :1].expand_as(padded), rtol=0, atol=1e-6)
    assert not torch.allclose(txt[:, 1, 0], txt[:, 1, 1])


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(
    transformer: Transformer, prompt: tuple[Tensor, Tensor], img: Tensor
) -> None:
    embeds, mask = prompt
    timesteps = torch.tensor([0.9, 0.3])
    ids = torch.stack([IDS, 2 * IDS + 5.5])

    together = transformer(img, ids, embeds, mask, timesteps)

    for i in range(B):
        row = slice(i, i + 1)
        alone = transformer(img[row], ids[i], embeds[row], mask[row], timesteps[row])
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_leaving_out_unwanted_rows_changes_no_wanted_one(
    transformer: Transformer, prompt: tuple[Tensor, Tensor], img: Tensor
) -> None:
    inputs = img, IDS, *prompt, torch.tensor([0.9, 0.3])

    velocity = transformer(*inputs, num_wanted=N // 2)

    assert velocity.shape[1] == N // 2
    torch.testing.assert_close(velocity, transformer(*inputs)[:, : N // 2])


@torch.no_grad()
def test_the_reference_offset_matters(
    transformer: Transformer, prompt: tuple[Tensor, Tensor], img: Tensor
) -> None:
    t = torch.full((B,), 0.5)

    moved = transformer(img, image_position_ids(2, 3, (0.0, 0.0, 0.0)), *prompt, t)

    assert not torch.allclose(moved, transformer(img, IDS, *prompt, t), atol=1e-4)


def test_gradients_reach_every_weight_under_bf16(
    prompt: tuple[Tensor, Tensor], img: Tensor
) -> None:
    connector = dataclasses.replace(CONFIG.connector, has_scale_factor=True)
    transformer = Transformer(dataclasses.replace(CONFIG, connector=connector))

    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(img, IDS, *prompt, torch.tensor([0.9, 0.3]))
    velocity.float().square().mean().backward()

    # The last double block's text continues into the single blocks, so nothing is left out.
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@torch.no_grad()
def test_bf16_weights_stay_close_to_float32(
    transformer: Transformer, prompt: tuple[Tensor, Tensor], img: Tensor
) -> None:
    embeds, mask = prompt
    t = torch.tensor([0.9, 0.3])
    half = Transformer(CONFIG)
    half.load_state_dict(transformer.state_dict())
    half = half.to(torch.bfloat16)

    velocity = half(img.bfloat16(), IDS, embeds.bfloat16(), mask, t)

    assert velocity.dtype == torch.bfloat16
    torch.testing.assert_close(
        velocity.float(), transformer(img, IDS, *prompt, t), rtol=0, atol=0.05
    )


def test_padded_text_sees_token_0_only() -> None:
    allowed = attention_mask(torch.tensor([[1, 1, 0], [0, 1, 1]])).squeeze(1).int()

    assert allowed[0].tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert allowed[1].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("preset", "tensors", "parameters"),
    [
        (V1_0, 817, 12_427_800_385),
        (V1_1, 816, 12_427_800_384),
        (V1_2, 818, 12_442_484_544),
    ],
)
def test_full_size_has_as_many_tensors_and_numbers_as_published(
    preset: ModelConfig, tensors: int, parameters: int
) -> None:
    with torch.device("meta"):
        state = Transformer(preset.transformer).state_dict()

    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_the_second_text_path_of_v1_2_counts_only_where_letters_are_quoted() -> None:
    torch.manual_seed(0)
    network = Transformer(dataclasses.replace(CONFIG, has_text_token_mapping=True))
    embeds = torch.randn(1, 4, CONFIG.connector.in_features)
    mask, t = torch.ones(1, 4), torch.ones(1)
    quoted = QuotedText(torch.randn_like(embeds), torch.tensor([[0, 0, 1, 0]]))

    with torch.no_grad():
        without = network.prologue(
            embeds, mask, t, QuotedText(quoted.embeds, torch.zeros_like(quoted.mask))
        ).txt
        changed = (network.prologue(embeds, mask, t, quoted).txt - without).abs().amax(-1)[0, 0]

    assert (changed > 0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("has_mapping", [True, False])
def test_quoted_text_without_a_mapping_and_a_mapping_without_text_are_refused(
    has_mapping: bool,
) -> None:
    network = Transformer(dataclasses.replace(CONFIG, has_text_token_mapping=has_mapping))
    embeds = torch.zeros(1, 2, CONFIG.connector.in_features)
    quoted = None if has_mapping else QuotedText(embeds, torch.ones(1, 2))

    with pytest.raises(ValueError, match="text token mapping"):
        network.prologue(embeds, torch.ones(1, 2), torch.ones(1), quoted)
