"""The whole model at toy size with random weights, built in a fraction of a second."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLModel

from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.conditioner import (
    SPECIAL_TOKENS,
    Conditioner,
    measure_prefix_length,
    small_vlm_config,
)
from step1x_edit.model.conditioner_v1_2 import ConditionerV12
from step1x_edit.model.config import TINY, V1_2, AutoencoderConfig, ModelConfig
from step1x_edit.model.language_model import add_lm_head
from step1x_edit.model.pipeline import EditPipeline, Recogniser
from step1x_edit.model.transformer import Transformer

VAE = AutoencoderConfig(
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    latent_channels=TINY.latent_channels,
    norm_num_groups=4,
)
WIDTH = 32


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with the chat's special tokens and few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["make it a night scene", "“n”" * 9, "User Prompt: assistant"]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tiny_config(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    """TINY for this tokenizer; `changes` are fields of its conditioner."""
    fields = {"text_length": 40, "fixed_image_size": 56, **changes}
    conditioner = dataclasses.replace(TINY.conditioner, **fields)
    prefix_length = measure_prefix_length(tokenizer, conditioner)
    conditioner = dataclasses.replace(conditioner, prefix_length=prefix_length)
    connector = dataclasses.replace(TINY.transformer.connector, in_features=WIDTH)
    transformer = dataclasses.replace(TINY.transformer, connector=connector)
    return dataclasses.replace(TINY, transformer=transformer, conditioner=conditioner)


def tiny_conditioner(**changes: object) -> Conditioner:
    """A conditioner with random weights."""
    tokenizer = tiny_tokenizer()
    vlm_config = small_vlm_config(
        tokenizer,
        hidden_size=WIDTH,
        num_layers=2,
        feed_forward_size=48,
        vision_hidden_size=32,
        vision_feed_forward_size=48,
        vision_heads=2,
    )
    torch.manual_seed(1)
    # The usual start is so close to zero that nothing would depend on anything.
    vlm_config.text_config.initializer_range = vlm_config.vision_config.initializer_range = 0.2
    vlm = Qwen2_5_VLModel(vlm_config).eval()
    return Conditioner(vlm, tokenizer, tiny_config(tokenizer, **changes).conditioner)


def tiny_conditioner_v1_2(**changes: object) -> ConditionerV12:
    """One of v1.2, which looks at pictures of four tokens and more."""
    v1 = tiny_conditioner()
    fields = {
        "text_length": 300,
        "is_padded": False,
        "quote_start": 75,
        "fixed_image_size": None,
        "min_pixels": 56 * 56,
        "max_pixels": 112 * 112,
        **changes,
    }
    return ConditionerV12(v1.vlm, v1.tokenizer, dataclasses.replace(v1.config, **fields))


def tiny_pipeline(labels: tuple[str, ...] = ()) -> EditPipeline:
    """A pipeline whose weights are exact in bfloat16, so that storing them loses nothing."""
    conditioner = tiny_conditioner()
    return assemble(conditioner, tiny_config(conditioner.tokenizer), labels)


def tiny_pipeline_v1_2() -> EditPipeline:
    """The same of v1.2."""
    conditioner = tiny_conditioner_v1_2()
    config = tiny_config(conditioner.tokenizer)
    config = dataclasses.replace(
        config,
        version="tiny v1.2",
        transformer=dataclasses.replace(config.transformer, has_text_token_mapping=True),
        conditioner=conditioner.config,
        reference_offset=V1_2.reference_offset,
        guidance_rule=V1_2.guidance_rule,
        reference_resize=V1_2.reference_resize,
        reasoning=V1_2.reasoning,
    )
    add_lm_head(conditioner.vlm)
    torch.manual_seed(5)
    conditioner.vlm.lm_head.weight.data.normal_()
    return assemble(conditioner, config)


def assemble(
    conditioner: Conditioner | ConditionerV12, config: ModelConfig, labels: tuple[str, ...] = ()
) -> EditPipeline:
    """A pipeline with other networks of the given sizes around a conditioner."""
    torch.manual_seed(2)
    transformer = Transformer(config.transformer).eval()
    vae = Autoencoder(VAE).eval()
    recogniser = Recogniser(WIDTH, labels) if labels else None
    for module in (transformer, vae, conditioner.vlm, recogniser):
        for parameter in module.parameters() if module else ():
            parameter.requires_grad_(False).copy_(parameter.bfloat16())
    return EditPipeline(transformer, vae, conditioner, config, recogniser)


def a_picture(width: int = 60, height: int = 40) -> npt.NDArray[np.uint8]:
    """Random pixels, always the same."""
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
