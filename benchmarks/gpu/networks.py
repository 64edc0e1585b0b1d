"""The compared networks: ours, the same one written plainly, and diffusers' FLUX.

The plain one does in every step what the reference does in every step, in its order: connector,
modulation, rotary tables, all tokens through all blocks. It uses the weights of one of our
transformers and none of its code, so that the two can be compared.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.blocks import Layout
from step1x_edit.model.config import ModelConfig, TransformerConfig
from step1x_edit.model.denoising import Branch, DenoiseState, Encoded, join, keep_one_pad
from step1x_edit.model.flow import euler_step, guide, schedule
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.pipeline import EditPipeline, Plan
from step1x_edit.model.request import Mask, Mode, NetworkRequest
from step1x_edit.model.savings import ALL, Savings
from step1x_edit.model.steps import PUBLISHED
from step1x_edit.model.transformer import Transformer

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

HAS_PEER = importlib.util.find_spec("diffusers") is not None
"""Whether the peer's library is installed; everything else works without it."""
NUM_STEPS = 28
GUIDANCE = 6.0
PIXELS_OF_TOKEN = 16
EPS = 1e-6


# --- random weights and inputs --------------------------------------------------------------------


@torch.no_grad()
def randomise(network: nn.Module, seed: int) -> None:
    """Weights that preserve the scale of activations; modulations are small."""
    first = next(network.parameters())
    generator = torch.Generator(first.device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                parameter.normal_(0, 0.02, generator=generator)
            continue  # norms stay at one
        is_modulation = any(part in name for part in ("_mod.", "modulation", ".norm1", "norm_out"))
        small = 0.2 if is_modulation else 1.0
        deviation = small / math.sqrt(parameter.shape[-1])
        parameter.normal_(0, deviation, generator=generator)


@contextlib.contextmanager
def born_as(dtype: torch.dtype) -> Iterator[None]:
    """Create new parameters in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def our_network(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Transformer:
    with device, born_as(dtype):
        network = Transformer(config).eval().requires_grad_(False)
    randomise(network, seed)
    return network


def peer_network(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> FluxTransformer2DModel:
    """FLUX.1 of the same sizes. It has no connector, so its text has the connector's width."""
    from diffusers import FluxTransformer2DModel

    with device, born_as(dtype):
        network = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.connector.hidden_size,
            pooled_projection_dim=config.vec_in_dim,
            axes_dims_rope=config.axes_dim,
        )
    network = network.eval().requires_grad_(False)
    randomise(network, seed=1)
    return network


def encoded_prompts(
    model: ModelConfig, pixels: int, valid: tuple[int, int], device: torch.device
) -> Encoded:
    """The result of the first stage for a square picture: random, the same every time."""
    side = pixels // PIXELS_OF_TOKEN
    transformer, length = model.transformer, model.conditioner.text_length
    generator = torch.Generator().manual_seed(pixels)
    reference = torch.randn(1, side * side, transformer.in_channels, generator=generator)
    embeds = torch.randn(2, length, transformer.connector.in_features, generator=generator)
    mask = (torch.arange(length) < torch.tensor(valid).unsqueeze(1)).long()
    embeds, mask = (embeds * mask.unsqueeze(-1)).to(device), mask.to(device)  # padded rows are zero
    branches = tuple(map(Branch, embeds.split(1), mask.split(1)))
    return Encoded(reference=reference.to(device), branches=branches, rows=side, columns=side)


# --- ours -----------------------------------------------------------------------------------------


def our_states(
    pipeline: EditPipeline,
    encoded: Encoded,
    plan: Plan | None = None,
    mode: Mode = "exact",
    mask: Mask | None = None,
) -> Generator[DenoiseState, None, None]:
    """The product's own loop."""
    # The picture has been encoded.
    request = NetworkRequest(
        None, "", num_steps=NUM_STEPS, guidance_scale=GUIDANCE, mode=mode, mask=mask
    )
    start = pipeline.start(encoded, seed=0)
    yield from pipeline.denoise(encoded, start, request, plan or Plan())


def our_pipeline(network: Transformer, model: ModelConfig, savings: Savings = ALL) -> EditPipeline:
    """A pipeline that can only denoise."""
    return EditPipeline(network, None, None, model, savings=savings, profile=PUBLISHED)  # type: ignore[arg-type]


def quarter(height: int, width: int) -> Mask:
    """A mask of 25 %: the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    return mask


def our_velocities(
    network: Transformer, model: ModelConfig, encoded: Encoded, steps: Iterable[int]
) -> list[Tensor]:
    """The predictions of our path for the first latents at each of these steps."""
    dtype = network.img_in.weight.dtype
    img, timesteps = _tokens(encoded, model)
    prompts = join(keep_one_pad(encoded.branches))
    prologue = network.prologue(prompts.embeds.to(dtype), prompts.mask, timesteps[:-1])
    text_length = prompts.embeds.shape[1]
    rope = network.rope(_ids(encoded, model), text_length)
    layout = Layout(rope, text_length, prompts.pad_copies, num_wanted=img.shape[1] // 2)
    return [network.core(img.to(dtype), prologue[step], layout).float() for step in steps]


@contextlib.contextmanager
def compiled(blocks: Iterable[nn.Module], backend: str) -> Iterator[None]:
    """The same blocks, compiled one by one; restored afterwards."""
    blocks = list(blocks)
    torch.compiler.reset()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        torch.compiler.reset()


# --- the same, written plainly --------------------------------------------------------------------


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring channels of x (B, H, N, D) by matrices (N, D/2, 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    turned = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
    return turned.reshape(x.shape).to(x.dtype)


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def add_gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    return x + gate * change


@dataclass(frozen=True)
class Helpers:
    """The three small functions that the reference has compiled."""

    rotate = staticmethod(rotate)
    scale_shift = staticmethod(scale_shift)
    add_gated = staticmethod(add_gated)


class CompiledHelpers:
    def __init__(self, backend: str) -> None:
        self.rotate = torch.compile(rotate, dynamic=True, backend=backend)
        self.scale_shift = torch.compile(scale_shift, dynamic=True, backend=backend)
        self.add_gated = torch.compile(add_gated, dynamic=True, backend=backend)


class PlainNetwork:
    """The network of the reference, step by step, on the weights of one of ours.

    It computes in `dtype`: weights of another type are converted at use.
    """

    def __init__(
        self,
        weights_of: Transformer,
        dtype: torch.dtype,
        helpers: Helpers | CompiledHelpers | None = None,
    ) -> None:
        self.config = weights_of.config
        self.dtype = dtype
        self.weights = dict(weights_of.named_parameters())
        self.help = helpers or Helpers()

    def velocity(self, img: Tensor, ids: Tensor, prompts: Branch, t: Tensor) -> Tensor:
        """(B, N, Cin) to (B, N, Cout), for timesteps t (B,)."""
        text, pooled = self.connector(prompts.embeds.to(self.dtype), prompts.mask, t)
        img = self.linear("img_in", img)
        vec = self.mlp_embedder("time_in", self.wave(1000 * t))
        vec = vec + self.mlp_embedder("vector_in", pooled)
        txt = self.linear("txt_in", text)
        table = self.rotations(torch.cat([ids.new_zeros(txt.shape[1], 3), ids]))
        for number in range(self.config.depth):
            img, txt = self.double_block(f"double_blocks.{number}", img, txt, vec, table)
        x = torch.cat([txt, img], dim=1)
        for number in range(self.config.depth_single):
            x = self.single_block(f"single_blocks.{number}", x, vec, table)
        x = x[:, txt.shape[1] :]
        shift, scale = self.modulation("final_layer.adaLN_modulation.1", vec, 2)
        return self.linear("final_layer.linear", self.help.scale_shift(x, scale, shift))

    def connector(self, embeds: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        weight = mask.unsqueeze(-1).float()
        mean = ((embeds.float() * weight).sum(1) / weight.sum(1)).to(self.dtype)
        factor = self.weights.get("connector.scale_factor")
        scaled = mean if factor is None else mean * (1 + factor)
        pooled = self.linear("connector.global_proj_out", scaled)
        timed = F.silu(self.linear("connector.S.t_embedder.mlp.0", self.wave(1000 * t)))
        context = F.silu(self.linear("connector.S.c_embedder.linear_1", mean))
        condition = self.linear("connector.S.t_embedder.mlp.2", timed)
        condition = condition + self.linear("connector.S.c_embedder.linear_2", context)
        x = self.linear("connector.S.input_embedder", embeds)
        valid = mask.bool()
        allowed = (valid.unsqueeze(1) & valid.unsqueeze(2)).unsqueeze(1)
        allowed[..., 0] = True
        heads = self.config.connector.num_heads
        for number in range(self.config.connector.depth):
            name = f"connector.S.individual_token_refiner.blocks.{number}"
            gate1, gate2 = self.modulation(f"{name}.adaLN_modulation.1", condition, 2)
            q, k, v = self.heads(
                self.linear(f"{name}.self_attn_qkv", self.norm(f"{name}.norm1", x)), heads
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + gate1 * self.linear(f"{name}.self_attn_proj", self.joined(attended))
            hidden = F.silu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
            x = x + gate2 * self.linear(f"{name}.mlp.fc2", hidden)
        return x, pooled

    def double_block(
        self, name: str, img: Tensor, txt: Tensor, vec: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        length = txt.shape[1]
        streams = {"txt": txt, "img": img}  # text comes first
        parts, modulations = [], {}
        for kind, x in streams.items():
            modulations[kind] = self.modulation(f"{name}.{kind}_mod.lin", vec, 6)
            shift, scale = modulations[kind][:2]
            qkv = self.linear(f"{name}.{kind}_attn.qkv", self.help.scale_shift(x, scale, shift))
            q, k, v = self.heads(qkv, self.config.num_heads)
            norm = f"{name}.{kind}_attn.norm"
            parts.append((self.rms(f"{norm}.query_norm", q), self.rms(f"{norm}.key_norm", k), v))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        attended = self.attention(q, k, v, table)
        of = {"txt": attended[:, :length], "img": attended[:, length:]}
        for kind, x in streams.items():
            _, _, gate1, shift2, scale2, gate2 = modulations[kind]
            x = self.help.add_gated(x, gate1, self.linear(f"{name}.{kind}_attn.proj", of[kind]))
            hidden = self.linear(f"{name}.{kind}_mlp.0", self.help.scale_shift(x, scale2, shift2))
            changed = self.linear(f"{name}.{kind}_mlp.2", F.gelu(hidden, approximate="tanh"))
            streams[kind] = self.help.add_gated(x, gate2, changed)
        return streams["img"], streams["txt"]

    def single_block(self, name: str, x: Tensor, vec: Tensor, table: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(f"{name}.modulation.lin", vec, 3)
        projected = self.linear(f"{name}.linear1", self.help.scale_shift(x, scale, shift))
        size = self.config.hidden_size
        qkv, hidden = projected.split([3 * size, self.config.mlp_size], dim=-1)
        q, k, v = self.heads(qkv, self.config.num_heads)
        q = self.rms(f"{name}.norm.query_norm", q)
        k = self.rms(f"{name}.norm.key_norm", k)
        both = torch.cat(
            [self.attention(q, k, v, table), F.gelu(hidden, approximate="tanh")], dim=-1
        )
        return self.help.add_gated(x, gate, self.linear(f"{name}.linear2", both))

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.linear(x.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight.to(self.dtype), bias.to(self.dtype), eps=EPS)

    def rms(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * self.weights[f"{name}.scale"].float()).to(x.dtype)

    def modulation(self, name: str, vec: Tensor, number: int) -> tuple[Tensor, ...]:
        """Split into n parts (B, 1, D)."""
        return self.linear(name, F.silu(vec)).unsqueeze(1).chunk(number, dim=-1)

    def mlp_embedder(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", F.silu(self.linear(f"{name}.in_layer", x)))

    def wave(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angle = t.float().unsqueeze(-1) * torch.exp(-math.log(10_000) * steps / 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def rotations(self, ids: Tensor) -> Tensor:
        """Matrices (N, D/2, 2, 2) for positions (N, axes)."""
        angles = []
        for axis, dim in enumerate(self.config.axes_dim):
            exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
            angles.append(ids[:, axis, None].double() * self.config.theta**-exponent)
        angle = torch.cat(angles, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos, -sin, sin, cos], dim=-1).view(*angle.shape, 2, 2).float()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        q, k = self.help.rotate(q, table), self.help.rotate(k, table)
        return self.joined(F.scaled_dot_product_attention(q, k, v))

    @staticmethod
    def heads(qkv: Tensor, number: int) -> list[Tensor]:
        """(B, N, 3D) to three of (B, H, N, D/H)."""
        return [each.unflatten(-1, (number, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=-1)]

    @staticmethod
    def joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


def plain_states(
    network: PlainNetwork, model: ModelConfig, encoded: Encoded, start: DenoiseState
) -> Generator[DenoiseState, None, None]:
    """The reference's loop: each step both prompts in one batch, velocities for all tokens."""
    device = encoded.reference.device
    latents, number = start.latents.to(device), start.latents.shape[1]
    times = schedule(NUM_STEPS, number).tolist()
    ids, prompts = _ids(encoded, model), join(encoded.branches)
    for step, (t, t_next) in enumerate(itertools.pairwise(times), 1):
        img = torch.cat([latents, encoded.reference], dim=1).expand(2, -1, -1)
        timestep = torch.full((2,), t, device=device)
        velocity = network.velocity(img, ids, prompts, timestep)[:, :number].float()
        cond, uncond = velocity.chunk(2)
        latents = euler_step(
            latents, guide(cond, uncond, GUIDANCE, t, model.guidance_rule), t, t_next
        )
        yield DenoiseState(latents, step)


def plain_velocities(
    network: PlainNetwork, model: ModelConfig, encoded: Encoded, steps: Iterable[int]
) -> list[Tensor]:
    img, timesteps = _tokens(encoded, model)
    ids, wanted = _ids(encoded, model), img.shape[1] // 2
    prompts = join(encoded.branches)
    return [
        network.velocity(img, ids, prompts, timesteps[step].expand(2))[:, :wanted].float()
        for step in steps
    ]


def _tokens(encoded: Encoded, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Noise and reference for both prompts, (2, 2N, C), and the schedule."""
    start = our_pipeline(None, model).start(encoded, seed=0)  # type: ignore[arg-type]
    device = encoded.reference.device
    img = torch.cat([start.latents.to(device), encoded.reference], dim=1).expand(2, -1, -1)
    return img, schedule(NUM_STEPS, start.latents.shape[1]).to(device)


def _ids(encoded: Encoded, model: ModelConfig) -> Tensor:
    ids = image_position_ids(encoded.rows, encoded.columns, model.reference_offset)
    return ids.to(encoded.reference.device)


# --- the peer -------------------------------------------------------------------------------------


def peer_steps(
    network: FluxTransformer2DModel, model: ModelConfig, encoded: Encoded
) -> Generator[Tensor, None, None]:
    """The same number of forward passes at the same lengths and batch, without other work."""
    config, device, dtype = model.transformer, network.device, network.dtype
    generator = torch.Generator().manual_seed(0)
    length, ids = model.conditioner.text_length, _ids(encoded, model)
    text = torch.randn(2, length, config.connector.hidden_size, generator=generator)
    pooled = torch.randn(2, config.vec_in_dim, generator=generator)
    text, pooled = text.to(device, dtype), pooled.to(device, dtype)
    img, timesteps = _tokens(encoded, model)
    for t in timesteps[:-1]:
        yield network(
            hidden_states=img.to(dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t.expand(2).to(dtype),
            img_ids=ids,
            txt_ids=ids.new_zeros(length, 3),
            return_dict=False,
        )[0]
