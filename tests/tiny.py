"""The whole model at toy size with random weights, built in a fraction of a second."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.conditioner import (
    IMAGE_PAD,
    MERGE_SIZE,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    VISION_END,
    VISION_START,
    Conditioner,
    measure_prefix_length,
    special_id,
)
from step1x_edit.model.conditioner_v1_2 import ConditionerV12
from step1x_edit.model.config import (
    V1_2,
    AutoencoderConfig,
    ConditionerConfig,
    ConnectorConfig,
    ModelConfig,
    TransformerConfig,
)
from step1x_edit.model.language_model import add_lm_head
from step1x_edit.model.pipeline import Edited, EditPipeline, Recogniser
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.steps import Curve, Profile
from step1x_edit.model.transformer import Transformer
from step1x_edit.schemas.answers import Location
from step1x_edit.worker.residency import Residency

TINY = ModelConfig(
    version="tiny",
    transformer=TransformerConfig(
        hidden_size=32,
        num_heads=2,
        axes_dim=(4, 6, 6),
        depth=1,
        depth_single=2,
        vec_in_dim=24,
        connector=ConnectorConfig(in_features=20, hidden_size=16, num_heads=2),
    ),
    conditioner=ConditionerConfig(
        prompt_prefix="Edit the picture:", prefix_length=4, text_length=12, fixed_image_size=28
    ),
    reference_offset=(1.0, 1.0, 1.0),
    generation_negative_prompt="blurry",
)
"""The architecture of v1.1 in 100 thousand parameters."""

VAE = AutoencoderConfig(
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    latent_channels=TINY.latent_channels,
    norm_num_groups=4,
)
WIDTH = 32

EVEN = Profile((Curve(4, ((1.0, 1.0),)), Curve(64, ((1.0, 1.0),))))
"""The velocity bends everywhere alike, in pictures of 4 to 64 tokens."""


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


def tiny_config(tokenizer: Tokenizer, **changes: Any) -> ModelConfig:
    """TINY for this tokenizer; `changes` are fields of its conditioner."""
    fields: dict[str, Any] = {"text_length": 40, "fixed_image_size": 56, **changes}
    conditioner = dataclasses.replace(TINY.conditioner, **fields)
    prefix_length = measure_prefix_length(tokenizer, conditioner)
    conditioner = dataclasses.replace(conditioner, prefix_length=prefix_length)
    connector = dataclasses.replace(TINY.transformer.connector, in_features=WIDTH)
    transformer = dataclasses.replace(TINY.transformer, connector=connector)
    return dataclasses.replace(TINY, transformer=transformer, conditioner=conditioner)


def tiny_vlm_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL in 100 thousand parameters, for a tokenizer that has the chat's special tokens."""
    ids = {name: special_id(tokenizer, name) for name in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],  # of the 4 pairs of a head: time, rows, columns
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids["<|endoftext|>"],  # no videos: an id that never occurs in a chat text
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def tiny_conditioner(**changes: Any) -> Conditioner:
    """A conditioner with random weights."""
    tokenizer = tiny_tokenizer()
    vlm_config = tiny_vlm_config(tokenizer)
    torch.manual_seed(1)
    # The usual initialisation is so close to zero that no output would depend on its input.
    vlm_config.text_config.initializer_range = vlm_config.vision_config.initializer_range = 0.2
    vlm = Qwen2_5_VLModel(vlm_config).eval()
    return Conditioner(vlm, tokenizer, tiny_config(tokenizer, **changes).conditioner)


def tiny_conditioner_v1_2(**changes: Any) -> ConditionerV12:
    """A conditioner of v1.2, which processes pictures of four tokens and more."""
    v1 = tiny_conditioner()
    fields: dict[str, Any] = {
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


def final_picture(pipeline: EditPipeline, request: NetworkRequest) -> npt.NDArray[np.uint8]:
    """The result at the end of an edit."""
    *_, last = pipeline.edit(request)
    assert isinstance(last, Edited)
    return last.image


def location(residency: Residency) -> Location:
    """The location of the model now. Mypy assumes that no method changes the attribute itself."""
    return residency.location
