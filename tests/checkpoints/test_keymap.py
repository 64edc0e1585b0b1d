"""The key map is complete, strict and reversible, at full size and on numbers."""

import dataclasses
import hashlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from check_parity import fold_scale_factor
from step1x_edit.checkpoints.keymap import (
    Link,
    to_diffusers,
    to_official,
    transformer_links,
    vae_links,
)
from step1x_edit.errors import CheckpointError
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.config import V1_0, V1_1, V1_2, AutoencoderConfig, TransformerConfig
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.transformer import Transformer
from tiny import TINY

# SHA-256 of the published key map at full size, one sorted line `official [shape] -> diffusers ...`
# per official tensor.
PUBLISHED_TRANSFORMER = "f138ca1aeb7343f4e4df2bc921419ed18e02ef21cc40be0fd920eec3c00a6786"
PUBLISHED_VAE = "86c781a7c589a84240d9099b95679bc227619fd192fe1055c66bd9ff636d47cf"


def digest(links: Sequence[Link], shapes: dict[str, Tensor]) -> str:
    lines = sorted(
        f"{link.official} {list(shapes[link.official].shape)} -> {' '.join(link.diffusers)}"
        for link in links
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def full_size(config: TransformerConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Transformer(config).state_dict()


def random_tensors(config: TransformerConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Transformer(config).state_dict()


def test_full_transformer_map_is_the_published_one() -> None:
    links, official = transformer_links(V1_1.transformer), full_size(V1_1.transformer)

    diffusers = to_diffusers(official, links)

    assert len(official) == 816
    assert len(diffusers) == 1196
    assert digest(links, official) == PUBLISHED_TRANSFORMER
    back = to_official(diffusers, links)
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in official.items()}


def test_full_v1_0_loses_its_factor_and_nothing_else() -> None:
    official = full_size(V1_0.transformer)

    assert len(official) == 817
    folded = fold_scale_factor(official)
    assert folded.keys() == official.keys() - {"connector.scale_factor"}
    assert len(to_diffusers(folded, transformer_links(V1_0.transformer))) == 1196


def test_full_v1_2_has_the_text_token_mapping() -> None:
    diffusers = to_diffusers(full_size(V1_2.transformer), transformer_links(V1_2.transformer))

    assert len(diffusers) == 1198
    assert 2 * sum(tensor.numel() for tensor in diffusers.values()) == 24_884_969_088


def test_full_vae_map_is_the_published_one() -> None:
    with torch.device("meta"):
        diffusers = Autoencoder(AutoencoderConfig()).state_dict()
    links = vae_links(AutoencoderConfig.block_out_channels, AutoencoderConfig.layers_per_block)

    official = to_official(diffusers, links)

    assert len(official) == 244
    assert digest(links, official) == PUBLISHED_VAE
    back = to_diffusers(official, links)
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in diffusers.items()}


def test_there_and_back_changes_no_number() -> None:
    config = TINY.transformer
    official = random_tensors(config)

    back = to_official(to_diffusers(official, transformer_links(config)), transformer_links(config))

    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items())


def test_fused_matrices_are_cut_in_the_right_order() -> None:
    config = TINY.transformer
    official, d = random_tensors(config), config.hidden_size

    diffusers = to_diffusers(official, transformer_links(config))

    linear1 = official["single_blocks.1.linear1.weight"]
    block = "single_transformer_blocks.1"
    assert torch.equal(diffusers[f"{block}.attn.to_k.weight"], linear1[d : 2 * d])
    assert torch.equal(diffusers[f"{block}.proj_mlp.weight"], linear1[3 * d :])
    qkv = official["double_blocks.0.txt_attn.qkv.bias"]
    assert torch.equal(diffusers["transformer_blocks.0.attn.add_v_proj.bias"], qkv[2 * d :])
    shift, scale = official["final_layer.adaLN_modulation.1.bias"].chunk(2)
    assert torch.equal(diffusers["norm_out.linear.bias"], torch.cat([scale, shift]))


@torch.no_grad()
def test_folding_the_scale_factor_keeps_the_prediction() -> None:
    connector = dataclasses.replace(TINY.transformer.connector, has_scale_factor=True)
    with_factor = Transformer(dataclasses.replace(TINY.transformer, connector=connector))
    without = Transformer(TINY.transformer)
    without.load_state_dict(fold_scale_factor(with_factor.state_dict()))
    ids = image_position_ids(2, 2, (0.0, 0.0, 0.0))
    inputs = torch.randn(1, 8, 64), ids, torch.randn(1, 5, 20), torch.ones(1, 5), torch.ones(1)

    torch.testing.assert_close(without(*inputs), with_factor(*inputs), rtol=0, atol=1e-5)


def test_missing_tensors_are_named() -> None:
    official = random_tensors(TINY.transformer)
    del official["img_in.weight"]

    with pytest.raises(CheckpointError, match=r"lacks tensors img_in\.weight"):
        to_diffusers(official, transformer_links(TINY.transformer))


def test_unknown_tensors_are_named() -> None:
    links = transformer_links(TINY.transformer)
    diffusers = to_diffusers(random_tensors(TINY.transformer), links)
    strangers = {f"strange.{i}": torch.zeros(1) for i in range(5)}

    with pytest.raises(CheckpointError, match=r"unknown tensors strange\.0, .* and 2 more"):
        to_official(diffusers | strangers, links)


def test_rows_of_another_model_are_refused() -> None:
    links = transformer_links(TINY.transformer)
    official = random_tensors(TINY.transformer)
    diffusers = to_diffusers(official, links)
    name = "double_blocks.0.img_attn.qkv.weight"

    with pytest.raises(CheckpointError, match=name):
        to_diffusers(official | {name: official[name][:-1]}, links)
    name = "transformer_blocks.0.attn.to_q.weight"
    with pytest.raises(CheckpointError, match=name):
        to_official(diffusers | {name: diffusers[name][:-1]}, links)
