"""Every number that the weights fix, as frozen data, and the named presets.

One code path serves checkpoints of very different sizes, because no module of the network contains
a width, an offset, a token id or a prompt: they are read from here. A checkpoint that is not one of
the presets stores its `ModelConfig` as JSON beside the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

PATCH_SIZE = 2
"""Side of the square of latent pixels that forms one token."""


class GuidanceRule(str, Enum):
    """When the guidance direction of a token is damped by a power of its norm."""

    OFFICIAL = "official"
    """In the first steps only, while the timestep is above 0.93."""
    ALWAYS = "always"
    """In every step."""
    NEVER = "never"
    """Plain classifier-free guidance."""


class ReferenceResize(str, Enum):
    """How the picture is resized for the autoencoder."""

    LANCZOS = "lanczos"
    """Like the picture that the conditioner sees, in 8 bits."""
    BILINEAR = "bilinear"
    """Antialiased, and never rounded to 8 bits."""


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of the connector between the conditioner and the transformer."""

    in_features: int = 3584
    hidden_size: int = 4096
    num_heads: int = 32
    depth: int = 2
    has_scale_factor: bool = False
    """v1.0 only: one learned number scales the pooled text before the global vector is made."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; the defaults are those of all published checkpoints."""

    in_channels: int = 64
    out_channels: int = 64
    hidden_size: int = 3072
    num_heads: int = 24
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    depth: int = 19
    depth_single: int = 38
    mlp_ratio: float = 4.0
    vec_in_dim: int = 768
    connector: ConnectorConfig = ConnectorConfig()
    has_text_token_mapping: bool = False
    """v1.2 only: a second path for the token embeddings of quoted text."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even and add up to the head size {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the hidden layer of every MLP."""
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class ConditionerConfig:
    """How picture and prompt are given to the vision-language model, and which states are kept."""

    prompt_prefix: str
    """Instruction put before the prompt."""
    prefix_length: int
    """Leading positions that are dropped from the hidden states."""
    text_length: int
    """Longest kept sequence."""
    is_padded: bool = True
    """Whether shorter sequences are filled with zero rows up to `text_length`; not in v1.2, whose
    prompt comes before the picture (`conditioner_v1_2`)."""
    quote_start: int = 155
    """Quotation marks up to this character of the chat text belong to the template."""
    quote_characters: str = "'“”"
    """Characters that count as `"`; empty if quoted text is not spelled out."""
    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 324 * 28 * 28
    """Limits of the image processor: 256 to 324 image tokens of 28 × 28 pixels."""
    fixed_image_size: int | None = None
    """Side of the square to which every picture is scaled, instead of the pixel limits."""


@dataclass(frozen=True)
class ReasoningConfig:
    """How a model whose conditioner is also a chat model reasons about an edit (`reasoning`)."""

    prompts: str = "reasoning_prompts.json"
    """File beside this module with the prompts that it was trained with."""
    has_ranking: bool = True
    """Whether it rates the pictures of all rounds; otherwise the last one is the result."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder. The defaults are the published ones."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the levels, from the picture inwards; each but the last halves the sides."""
    layers_per_block: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    latent_channels: int = 16
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AutoencoderConfig:
        """Build a config from plain data. Raises ValueError on unknown or missing fields."""
        widths = tuple(data.get("block_out_channels", ()))
        return _from_fields(cls, {**data, "block_out_channels": widths})


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: the transformer and the geometry around it."""

    version: str
    transformer: TransformerConfig
    conditioner: ConditionerConfig
    reference_offset: tuple[float, float, float]
    """Added to the position ids of the reference tokens."""
    latent_channels: int = 16
    vae_scale: int = 8
    """Pixels per latent pixel, along each side."""
    latent_scale: float = 0.3611
    latent_shift: float = 0.1159
    """Latents are `latent_scale * (z - latent_shift)` for the autoencoder's z."""
    guidance_rule: GuidanceRule = GuidanceRule.OFFICIAL
    reference_resize: ReferenceResize = ReferenceResize.LANCZOS
    reasoning: ReasoningConfig | None = None
    """None: it cannot reason, and its language head is not read."""
    generation_negative_prompt: str | None = None
    """The default negative prompt of text to image; None: the model only edits."""

    def __post_init__(self) -> None:
        channels = self.latent_channels * PATCH_SIZE**2
        if self.transformer.in_channels != channels or self.transformer.out_channels != channels:
            raise ValueError(
                f"{self.latent_channels} latent channels make tokens of {channels} channels, but "
                f"the transformer has {self.transformer.in_channels} in and "
                f"{self.transformer.out_channels} out"
            )

    @property
    def can_generate(self) -> bool:
        """Whether the model makes pictures from the prompt alone."""
        return self.generation_negative_prompt is not None

    @property
    def size_multiple(self) -> int:
        """Sides of the edited picture are multiples of this many pixels: one token."""
        return self.vae_scale * PATCH_SIZE

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; `from_json` turns it back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build a config from `to_json` data. Raises ValueError on unknown or missing fields."""
        transformer = dict(data.get("transformer", {}))
        connector = _from_fields(ConnectorConfig, transformer.get("connector", {}))
        transformer |= {
            "connector": connector,
            "axes_dim": tuple(transformer.get("axes_dim", TransformerConfig.axes_dim)),
        }
        fields = dict(data) | {
            "transformer": _from_fields(TransformerConfig, transformer),
            "conditioner": _from_fields(ConditionerConfig, data.get("conditioner", {})),
            "reference_offset": tuple(data.get("reference_offset", ())),
            "guidance_rule": GuidanceRule(data.get("guidance_rule", cls.guidance_rule)),
            "reference_resize": ReferenceResize(data.get("reference_resize", cls.reference_resize)),
            "reasoning": _from_fields(ReasoningConfig, data["reasoning"])
            if data.get("reasoning")
            else None,
        }
        return _from_fields(cls, fields)


T = TypeVar("T")


def _from_fields(kind: type[T], data: Mapping[str, Any]) -> T:
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


PROMPT_PREFIX_V1 = """\
Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions \
suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and \
spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without \
overcomplicating.

Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, \
sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring \
glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus \
passing by towering glass skyscrapers.

Please generate only the enhanced description for the prompt below and avoid including any \
additional commentary or evaluations:
User Prompt:"""

PROMPT_PREFIX_V1_2 = """\
Given a reference image and a user editing instruction.
You need to understand the information of the reference image and the content of the editing \
instruction,
and then generate a detailed description of the edited target image based on the reference image \
and the editing instruction.\x20
The description should include the requirements in the editing instruction and try to closely \
match the content of the target image.
The editing instruction is:"""

GENERATION_NEGATIVE_PROMPT = """\
worst quality, wrong limbs, unreasonable limbs, normal quality, low quality, low res, \
blurry, text, watermark, logo, banner, extra digits, cropped, jpeg artifacts, \
signature, username, error, sketch ,duplicate, ugly, monochrome, horror, geometry, \
mutation, disgusting"""
"""The negative prompt of text to image, as published (`t2i_negative_prompt` of the reference)."""

# 217 is the position of the colon that ends the prefix: v1.0 and v1.1 were trained with the hidden
# states from there on. v1.2 has a shorter prefix and cuts at 90 by the same rule.
_CONDITIONER_V1 = ConditionerConfig(
    prompt_prefix=PROMPT_PREFIX_V1, prefix_length=217, text_length=640
)
_CONDITIONER_V1_2 = ConditionerConfig(
    prompt_prefix=PROMPT_PREFIX_V1_2,
    prefix_length=90,
    text_length=2048,
    is_padded=False,
    quote_start=449,
    quote_characters="“”",
    max_pixels=400 * 28 * 28,
)

V1_0 = ModelConfig(
    version="v1.0",
    transformer=TransformerConfig(connector=ConnectorConfig(has_scale_factor=True)),
    conditioner=_CONDITIONER_V1,
    reference_offset=(0.0, 0.0, 0.0),
)
"""April 2025."""

V1_1 = ModelConfig(
    version="v1.1",
    transformer=TransformerConfig(),
    conditioner=_CONDITIONER_V1,
    reference_offset=(1.0, 1.0, 1.0),
    generation_negative_prompt=GENERATION_NEGATIVE_PROMPT,
)
"""July 2025; the first that also makes pictures from the prompt alone."""

V1_2 = ModelConfig(
    version="v1.2",
    transformer=TransformerConfig(has_text_token_mapping=True),
    conditioner=_CONDITIONER_V1_2,
    reference_offset=(1.0, 0.0, 0.0),
    guidance_rule=GuidanceRule.ALWAYS,
    reference_resize=ReferenceResize.BILINEAR,
    reasoning=ReasoningConfig(),
)
"""November 2025, with thinking and reflection."""

V1_2_PREVIEW = dataclasses.replace(
    V1_2,
    version="v1.2-preview",
    reasoning=ReasoningConfig(prompts="reasoning_prompts_preview.json", has_ranking=False),
)
"""September 2025. Its tensors have the names and shapes of v1.2."""

REASONING = frozenset(
    config.version for config in (V1_0, V1_1, V1_2, V1_2_PREVIEW) if config.reasoning is not None
)
"""The versions with thinking and reflection."""

DEMO = ModelConfig(
    version="demo",
    transformer=TransformerConfig(
        in_channels=192,
        out_channels=192,
        hidden_size=256,
        num_heads=4,
        axes_dim=(8, 28, 28),
        depth=1,
        depth_single=4,
        connector=ConnectorConfig(in_features=128, hidden_size=128, num_heads=4),
    ),
    conditioner=ConditionerConfig(
        prompt_prefix="User Prompt:",
        prefix_length=35,  # in the vocabulary that was trained with it
        text_length=48,
        quote_characters="",  # it cannot draw letters, and one apostrophe would spell out the rest
        fixed_image_size=56,
    ),
    reference_offset=(1.0, 1.0, 1.0),
    latent_channels=48,
    vae_scale=16,
    latent_scale=1.0,
    latent_shift=0.0,
)
"""The embedded checkpoint: the architecture of v1.1, its transformer in 8 million parameters."""

ONLY_EDITING = frozenset(
    config.version for config in (V1_0, V1_1, V1_2, V1_2_PREVIEW, DEMO) if not config.can_generate
)
"""The versions without text to image."""
