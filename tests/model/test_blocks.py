"""Our blocks against an independent oracle: diffusers' FLUX blocks with the same random weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.checkpoints.keymap import to_diffusers, transformer_links
from step1x_edit.model.blocks import Layout, timestep_embedding
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.rope import apply_rope, rope_table
from step1x_edit.model.transformer import Transformer
from tiny import TINY

flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")

CONFIG = TINY.transformer
D, HEADS, HEAD_DIM = CONFIG.hidden_size, CONFIG.num_heads, CONFIG.head_dim
L, IDS = 5, image_position_ids(3, 4, (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    transformer = Transformer(CONFIG)
    for name, parameter in transformer.named_parameters():
        if name.endswith(".scale"):  # ones by default, which would hide a swap of q and k
            nn.init.normal_(parameter, 1.0, 0.3)
    return transformer.requires_grad_(False)


def diffusers_weights(transformer: Transformer, prefix: str) -> dict[str, Tensor]:
    weights = to_diffusers(transformer.state_dict(), transformer_links(CONFIG))
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def oracle_rope() -> tuple[Tensor, Tensor]:
    ids = torch.cat([torch.zeros(L, 3), IDS])
    cos, sin = flux.FluxPosEmbed(theta=CONFIG.theta, axes_dim=list(CONFIG.axes_dim))(ids)
    return cos, sin


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, len(IDS), D), torch.randn(2, L, D), torch.randn(2, D)


def test_rope_table_equals_flux(transformer: Transformer) -> None:
    cos, sin = oracle_rope()

    found_cos, found_sin = transformer.rope(IDS, L).squeeze(0).unbind(-1)

    torch.testing.assert_close(found_cos.repeat_interleave(2, -1), cos.float(), rtol=0, atol=0)
    torch.testing.assert_close(found_sin.repeat_interleave(2, -1), sin.float(), rtol=0, atol=0)


def test_double_block_equals_flux(transformer: Transformer) -> None:
    oracle = flux.FluxTransformerBlock(D, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM)
    oracle.load_state_dict(diffusers_weights(transformer, "transformer_blocks.0."))
    img, txt, vec = inputs()
    expected_txt, expected_img = oracle(
        hidden_states=img,
        encoder_hidden_states=txt,
        temb=vec,
        image_rotary_emb=oracle_rope(),
    )

    block = transformer.double_blocks[0]
    found_img, found_txt = block(
        img, txt, *block.modulations(F.silu(vec)), Layout(transformer.rope(IDS, L), L)
    )

    torch.testing.assert_close(found_img, expected_img, rtol=0, atol=5e-6)
    torch.testing.assert_close(found_txt, expected_txt, rtol=0, atol=5e-6)


def test_single_block_equals_flux(transformer: Transformer) -> None:
    oracle = flux.FluxSingleTransformerBlock(
        D, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM
    )
    oracle.load_state_dict(diffusers_weights(transformer, "single_transformer_blocks.1."))
    img, txt, vec = inputs()
    expected = oracle(
        hidden_states=img,
        encoder_hidden_states=txt,
        temb=vec,
        image_rotary_emb=oracle_rope(),
    )

    block = transformer.single_blocks[1]
    layout = Layout(transformer.rope(IDS, L), L)
    found = block(torch.cat([txt, img], dim=1), block.modulation(F.silu(vec)), layout)

    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=0, atol=5e-6)


def test_rope_of_far_positions_keeps_its_precision() -> None:
    position, frequency = 4096.0, 10_000 ** (-2 / 16)

    table = rope_table(torch.tensor([[position]]), (16,), 10_000)

    expected = torch.tensor(position * frequency, dtype=torch.float64).cos().float()
    assert table[0, 1, 0] == expected


def test_rotations_are_compiled_without_complex_numbers() -> None:
    types: set[torch.dtype] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        types.update(value.dtype for value in values if isinstance(value, Tensor))
        return graph.forward

    x = torch.randn(2, 4, 7, 16)
    table = rope_table(torch.randn(7, 3), (4, 6, 6), 10_000)

    found = torch.compile(apply_rope, backend=backend, fullgraph=True)(x, table)

    assert types == {torch.float32}
    torch.testing.assert_close(found, apply_rope(x, table), rtol=0, atol=1e-6)


def test_timesteps_that_bf16_confuses_are_told_apart() -> None:
    first, second = timestep_embedding(torch.tensor([0.9990, 0.9985]))

    assert (first - second).abs().max() > 0.1
