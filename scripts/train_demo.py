"""Trains the demo checkpoint from scratch: `python scripts/train_demo.py`.

Stages. Each is kept in the work folder: a finished one is not repeated (delete its file to do so),
an interrupted one continues where it stopped:

    vae          closed-form start, then gradient descent on crops
    text         byte-level BPE and a tiny Qwen2.5-VL, trained to tell the edits apart
    latents      crops and their exact edits, encoded once
    transformer  starts as an exact identity editor, learns the edits through the guided velocity
    decoder      the autoencoder's decoder alone, on latents as the transformer makes them
    export       one safetensors file, config and tokenizer, where `--out` says; measure its steps
                 afterwards with `calibrate_steps.py`

`--stages vae,text` runs some of them, `--smoke` runs three steps of each at toy size.
`--start-from FOLDER` continues a checkpoint instead: autoencoder and transformer continue from its
weights, at lower rates; its text encoder and recogniser are kept.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Spinning threads take time from the other core on small machines; must be set before torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

import demo_prompts
from demo_data import (
    EDITS,
    HELD_OUT_PHOTOS,
    TRAINING_PHOTOS,
    TRAINING_TEXTURES,
    draw_picture,
    load_photo,
    random_crop,
    recolour,
    resize,
)
from step1x_edit.checkpoints.read import read_checkpoint, write_demo
from step1x_edit.model.autoencoder import Autoencoder, ResnetBlock
from step1x_edit.model.blocks import timestep_embedding
from step1x_edit.model.conditioner import (
    IMAGE_PAD,
    MERGE_SIZE,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    VISION_END,
    VISION_START,
    Conditioner,
    measure_prefix_length,
    pad_ids,
    render_chat,
    special_id,
)
from step1x_edit.model.config import DEMO, AutoencoderConfig, TransformerConfig
from step1x_edit.model.connector import masked_mean
from step1x_edit.model.flow import euler_step, guide, schedule, shift
from step1x_edit.model.latents import image_position_ids, pack, unpack
from step1x_edit.model.pipeline import EditPipeline, Recogniser
from step1x_edit.model.rope import apply_rope, rope_table
from step1x_edit.model.transformer import Transformer

VAE_CONFIG = AutoencoderConfig(
    block_out_channels=(16, 32, 64, 128, 128),
    layers_per_block=1,
    latent_channels=48,
    norm_num_groups=4,
    mid_block_add_attention=False,
)

WHITENING = 0.65
"""Exponent of the latent whitening: 1 gives every channel unit variance, 0 keeps the picture's own.
In between, the channels that matter most visually (the cell's mean colour) stand out from the noise
earlier and weigh more."""


def reduced_precision() -> torch.autocast:
    """Compute in bfloat16 if the processor supports it; otherwise it is many times slower."""
    return torch.autocast(
        "cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


# ------------------------------------------------------------------------------------------------
# Pictures in memory
# ------------------------------------------------------------------------------------------------


class Gallery:
    """All training pictures; draws augmented crops."""

    def __init__(self, seed: int, drawn: int, drawn_size: int = 384) -> None:
        self.photos = [load_photo(*place) for place in TRAINING_PHOTOS.values()]
        self.textures = [load_photo(*place) for place in TRAINING_TEXTURES.values()]
        rng = np.random.default_rng(seed)
        self.drawn = [draw_picture(rng, drawn_size, self.photos) for _ in range(drawn)]

    def crop(
        self, rng: np.random.Generator, size: int, scales: tuple[float, float] = (0.4, 2.5)
    ) -> np.ndarray:
        kind = rng.uniform()
        if kind < 0.60:
            source = self.photos[int(rng.integers(len(self.photos)))]
        elif kind < 0.68:
            source = self.textures[int(rng.integers(len(self.textures)))] * rng.uniform(
                0.5, 1, 3
            ).astype(np.float32)
        else:
            source = self.drawn[int(rng.integers(len(self.drawn)))]
        crop = random_crop(rng, source, size, scales)
        return recolour(rng, crop) if rng.uniform() < 0.8 else crop


def to_batch(pictures: list[np.ndarray]) -> Tensor:
    """Pictures in 0..1 to (B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().mul(2).sub(1)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB for pictures in -1..1."""
    return float(-10 * torch.log10(((a.clamp(-1, 1) - b) / 2).pow(2).mean() + 1e-12))


# ------------------------------------------------------------------------------------------------
# Autoencoder: closed-form start
# ------------------------------------------------------------------------------------------------


def space_to_depth_weight(rows: Tensor, channels_in: int, channels_out: int) -> Tensor:
    """A 3x3 stride-2 kernel whose output is `rows` times the 2x2 cell (channel order c, dy, dx)."""
    weight = torch.zeros(channels_out, channels_in, 3, 3)
    cell = rows.reshape(rows.shape[0], -1, 2, 2)
    weight[: cell.shape[0], : cell.shape[1], :2, :2] = cell
    return weight


@torch.no_grad()
def start_vae(gallery: Gallery, seed: int, crops: int) -> Autoencoder:
    """An autoencoder that encodes by nested principal components and decodes by least squares."""
    torch.manual_seed(seed)
    vae = Autoencoder(VAE_CONFIG)
    rng = np.random.default_rng(seed)
    pictures = to_batch([gallery.crop(rng, 128) for _ in range(crops)])

    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                shortcut = module.conv_shortcut
                nn.init.normal_(shortcut.weight, std=0.02)
                nn.init.zeros_(shortcut.bias)
                keep = min(shortcut.weight.shape[:2])
                shortcut.weight[:keep] = 0
                shortcut.weight[:keep, :keep] = torch.eye(keep)[..., None, None]

    encoder, decoder = vae.encoder, vae.decoder
    nn.init.normal_(encoder.conv_in.weight, std=0.02)
    nn.init.zeros_(encoder.conv_in.bias)
    encoder.conv_in.weight[:3] = 0
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1.0

    # Encoder: every downsampling keeps the first principal components of 2x2 cells.
    features, levels = pictures, [pictures]
    for index, keep in enumerate((12, 32, 64, 48)):
        cells = F.pixel_unshuffle(features, 2)  # (B, 4C, H/2, W/2)
        flat = cells.permute(0, 2, 3, 1).reshape(-1, cells.shape[1])
        mean = flat.mean(0) if index == 3 else torch.zeros(cells.shape[1])
        centred = (flat - mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(flat))
        order = values.argsort(descending=True)[:keep]
        rows = vectors[:, order].T
        if index == 3:
            rows = rows * (values[order].clamp_min(1e-8) ** (-WHITENING / 2))[:, None]
            spread = ((flat - mean).double() @ rows.T).pow(2).mean().sqrt()
            rows = rows / spread
        rows = rows.float()
        features = torch.einsum("kc,bchw->bkhw", rows, cells - mean[:, None, None])
        levels.append(features)
        conv = encoder.down_blocks[index].downsamplers[0].conv
        nn.init.normal_(conv.weight, std=0.02)
        nn.init.zeros_(conv.bias)
        if index < 3:
            conv.weight[:keep] = space_to_depth_weight(rows, conv.in_channels, conv.out_channels)[
                :keep
            ]
        else:
            # silu(z) - silu(-z) = z: a latent is a pair of channels; constants steady the norm.
            conv.weight.zero_()
            full = space_to_depth_weight(
                torch.cat([rows, -rows]), conv.in_channels, conv.out_channels
            )
            order_out = pair_layout(48, 128, 4)
            conv.weight[order_out] = full[:96]
            conv.bias[order_out] = torch.cat([-(rows @ mean), rows @ mean])
            constants = [c for c in range(128) if c not in set(order_out.tolist())]
            conv.bias[constants] = CONSTANT * torch.tensor([1.0, -1.0]).repeat(16)
    pairs = pair_layout(48, 128, 4)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.bias.zero_()
    for latent in range(48):
        encoder.conv_out.weight[latent, pairs[latent], 1, 1] = 1.0
        encoder.conv_out.weight[latent, pairs[48 + latent], 1, 1] = -1.0
    encoder.conv_out.bias[48:] = -6.0
    captured = capture(encoder, encoder.conv_norm_out, pictures[:64])
    match_norm(encoder.conv_norm_out, captured)

    # Decoder: least squares from the upsampled features to the components one level finer.
    latents = vae.encode(pictures)
    error = (latents - levels[4]).pow(2).mean().sqrt() / levels[4].std()
    print(f"encoder against its closed form: relative error {float(error):.4f}")
    nn.init.normal_(decoder.conv_in.weight, std=0.02)
    nn.init.zeros_(decoder.conv_in.bias)
    decoder.conv_in.weight[:48] = 0
    decoder.conv_in.weight[range(48), range(48), 1, 1] = 1.0
    features = latents
    for index in range(4):
        target = levels[3 - index]
        conv = decoder.up_blocks[index].upsamplers[0].conv
        upsampled = F.interpolate(features, scale_factor=2.0, mode="nearest")
        kernel, bias = least_squares_conv(upsampled, target)
        nn.init.normal_(conv.weight, std=0.02)
        nn.init.zeros_(conv.bias)
        keep = target.shape[1]
        conv.weight[:keep] = 0
        conv.weight[:keep, : kernel.shape[1]] = kernel
        conv.bias[:keep] = bias
        features = F.conv2d(upsampled, kernel, bias, padding=1)
        fit = (features - target).pow(2).mean().sqrt() / target.std()
        print(f"decoder level {index}: relative error {float(fit):.3f}")
    # The last 16 channels: the three colours and their mean as +/- pairs, the rest constant.
    last = decoder.up_blocks[4].resnets[0].conv_shortcut
    nn.init.zeros_(last.weight)
    signals = torch.eye(3)
    signals = torch.cat([signals, signals.mean(0, keepdim=True)])
    for group in range(4):
        last.weight[4 * group, :3, 0, 0] = signals[group]
        last.weight[4 * group + 1, :3, 0, 0] = -signals[group]
        last.bias[4 * group + 2] = CONSTANT
        last.bias[4 * group + 3] = -CONSTANT
    nn.init.zeros_(decoder.conv_out.weight)
    nn.init.zeros_(decoder.conv_out.bias)
    for colour in range(3):
        decoder.conv_out.weight[colour, 4 * colour, 1, 1] = 1.0
        decoder.conv_out.weight[colour, 4 * colour + 1, 1, 1] = -1.0
    captured = capture(decoder, decoder.conv_norm_out, latents[:64])
    match_norm(decoder.conv_norm_out, captured)
    return vae


CONSTANT = 6.0


def pair_layout(signals: int, channels: int, groups: int) -> Tensor:
    """Channel numbers for +z (first half) and -z (second half), spread over the norm groups."""
    per_group, width = 2 * signals // groups, channels // groups
    plus: list[int] = []
    minus: list[int] = []
    for group in range(groups):
        base = group * width
        plus += range(base, base + per_group // 2)
        minus += range(base + per_group // 2, base + per_group)
    return torch.tensor(plus + minus)


@torch.no_grad()
def capture(module: nn.Module, norm: nn.GroupNorm, inputs: Tensor) -> Tensor:
    """The input of `norm` when `module` processes `inputs`."""
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    module(inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def match_norm(norm: nn.GroupNorm, arriving: Tensor) -> None:
    """Sets scale and bias so that the norm returns, on average, its input."""
    grouped = arriving.unflatten(1, (norm.num_groups, -1))
    deviation = grouped.var((2, 3, 4), correction=0).sqrt().mean(0)
    mean = grouped.mean((0, 2, 3, 4))
    width = norm.num_channels // norm.num_groups
    norm.weight.copy_(deviation.repeat_interleave(width))
    norm.bias.copy_(mean.repeat_interleave(width))


def least_squares_conv(
    inputs: Tensor, target: Tensor, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The 3x3 convolution with bias that best turns `inputs` into `target` away from the border."""
    channels = inputs.shape[1]
    gram = torch.zeros(channels * 9 + 1, channels * 9 + 1, dtype=torch.float64)
    cross = torch.zeros(channels * 9 + 1, target.shape[1], dtype=torch.float64)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(inputs))[: max(40, 12000 // inputs.shape[-1] ** 2)]
    for index in chosen:
        patches = F.unfold(inputs[index : index + 1], 3)[0].T  # (positions, 9C), without padding
        wanted = target[index, :, 1:-1, 1:-1].flatten(1).T
        if len(patches) > 1500:
            pick = torch.from_numpy(rng.permutation(len(patches))[:1500])
            patches, wanted = patches[pick], wanted[pick]
        patches = torch.cat([patches, torch.ones(len(patches), 1)], 1).double()
        gram += patches.T @ patches
        cross += patches.T @ wanted.double()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, cross).float()
    return solution[:-1].T.reshape(-1, channels, 3, 3), solution[-1]


# ------------------------------------------------------------------------------------------------
# Autoencoder: training
# ------------------------------------------------------------------------------------------------


def held_out_pictures(level: int) -> dict[str, Tensor]:
    """The held-out photographs, at the size at which the pipeline would pass them to the model."""
    out = {}
    for name, place in HELD_OUT_PHOTOS.items():
        photo = load_photo(*place)
        height, width = photo.shape[:2]
        scale = level / (height * width) ** 0.5
        size = round(width * scale / 32) * 32, round(height * scale / 32) * 32
        out[name] = to_batch([resize(photo, *size)])
    return out


@torch.no_grad()
def reconstruction(vae: Autoencoder, level: int) -> dict[str, float]:
    return {
        name: round(psnr(vae.decode(vae.encode(p)), p), 2)
        for name, p in held_out_pictures(level).items()
    }


def picture_loss(out: Tensor, target: Tensor) -> Tensor:
    """Absolute, squared, gradient and coarse absolute error."""
    difference = out - target
    loss = difference.abs().mean() + 8 * difference.pow(2).mean()
    loss = loss + 0.25 * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
    return loss + 0.5 * F.avg_pool2d(difference, 4).abs().mean()


class Average:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            self.values[key].lerp_(value, 1 - decay)


class Run:
    """The training of one stage: its loop, and the state that survives an interruption.

    While it runs, everything is kept in `<stage>.state.pt`. At the end only the averaged weights
    remain, in `<stage>.pt`, and the stage counts as finished. All randomness is derived from seed
    and step, so that an interrupted run takes the same course.
    """

    SAVED_EVERY = 100

    def __init__(
        self,
        work: Path,
        stage: str,
        model: nn.Module,
        optimisers: list[torch.optim.Optimizer],
        seed: int,
        decay: float = 0.995,
    ) -> None:
        self.finished = work / f"{stage}.pt"
        self.state = work / f"{stage}.state.pt"
        self.stage, self.seed, self.model, self.optimisers = stage, seed, model, optimisers
        self.average = Average(model, decay)
        self.rates = [[group["lr"] for group in o.param_groups] for o in optimisers]
        self.step, self.seconds = 0, 0.0
        if self.state.exists():
            saved = torch.load(self.state)
            model.load_state_dict(saved["model"])
            self.average.values = saved["average"]
            for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            self.step, self.seconds = saved["step"], saved["seconds"]

    def steps(self, steps: int, minutes: float) -> Iterator[float]:
        """Yields the progress of the run (0..1), once per step; limited by minutes too, if set."""
        while True:
            started = time.monotonic()
            done = self.step / steps
            if minutes:
                done = max(done, self.seconds / 60 / minutes)
            if done >= 1:
                break
            torch.manual_seed(self.seed * 1_000_003 + self.step)
            yield done
            self.average.update(self.model, self.step)
            self.step += 1
            self.seconds += time.monotonic() - started
            if self.step % self.SAVED_EVERY == 0:
                self._save()
        write(self.average.values, self.finished)
        self.state.unlink(missing_ok=True)

    def rng(self) -> np.random.Generator:
        """The random generator of this step."""
        return np.random.default_rng([self.seed, self.step, *self.stage.encode()])

    def descend(self, loss: Tensor, factor: float, clip: float) -> None:
        """One step of all optimisers at `factor` times their rates."""
        for optimiser, rates in zip(self.optimisers, self.rates, strict=True):
            optimiser.zero_grad(set_to_none=True)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], clip)
        for optimiser in self.optimisers:
            optimiser.step()

    def tell(self, every: int, loss: Tensor, more: Callable[[], object] = str) -> None:
        """Prints a line now and then; `more` is computed only then."""
        if (self.step + 1) % every == 0:
            pace = self.seconds / max(1, self.step)
            told = f"{self.stage} {self.step + 1} {pace:.2f}s loss {float(loss.detach()):.4f}"
            print(told, more(), flush=True)

    def _save(self) -> None:
        write(
            {
                "model": self.model.state_dict(),
                "average": self.average.values,
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "step": self.step,
                "seconds": self.seconds,
            },
            self.state,
        )


def write(data: object, path: Path) -> None:
    """Saves a file completely or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(data, partial)
    partial.replace(path)


def edited_crop(
    gallery: Gallery, rng: np.random.Generator, size: int, share: float = 0.35
) -> np.ndarray:
    """A crop; with probability `share` one of its exact edits, to train the decoder on edits."""
    crop = gallery.crop(rng, size)
    if rng.uniform() < share:
        crop = list(EDITS.values())[int(rng.integers(len(EDITS)))](crop)
    return crop


def train_vae(
    work: Path,
    gallery: Gallery,
    seed: int,
    steps: int,
    minutes: float,
    start_crops: int,
    start: Autoencoder | None,
) -> None:
    vae = start or start_vae(gallery, seed, start_crops)
    print("start", reconstruction(vae.eval(), 512), flush=True)
    vae = vae.to(memory_format=torch.channels_last).train()
    vae.requires_grad_(True)
    rate = 4e-4 if start else 5e-4
    optimiser = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=1e-4)
    run = Run(work, "vae", vae, [optimiser], seed)
    for done in run.steps(steps, minutes):
        rng = run.rng()
        # Group norms see a whole picture at once; small crops alone teach wrong statistics.
        size, count = (256, 2) if run.step % 2 else (128, 8)
        batch = to_batch([edited_crop(gallery, rng, size) for _ in range(count)]).to(
            memory_format=torch.channels_last
        )
        with reduced_precision():
            latents = vae.encode(batch)
            noisy = latents + torch.randn_like(latents) * float(rng.uniform(0, 0.05))
            out = vae.decode(noisy)
        size_penalty = (latents.float().pow(2).mean((0, 2, 3)) - 4).clamp_min(0).mean()
        loss = picture_loss(out.float(), batch) + 1e-3 * size_penalty
        run.descend(loss, min(1, (run.step + 1) / 60) * (1 - done) ** 0.7, clip=1.0)
        run.tell(200, loss, lambda: judge(run))


def judge(run: Run) -> dict[str, float]:
    """Reconstruction of the held-out photographs with the averaged weights of a run."""
    vae = Autoencoder(VAE_CONFIG)
    vae.load_state_dict(run.average.values)
    return reconstruction(vae.eval(), 512)


# ------------------------------------------------------------------------------------------------
# Text: vocabulary, the tiny Qwen2.5-VL, the recogniser
# ------------------------------------------------------------------------------------------------


def train_tokenizer(prompts: list[str]) -> Tokenizer:
    """A byte-level BPE; the chat's special tokens come first, in their fixed order.

    Case, width and the place in the sentence make no difference: "BLACK", "Ｂｌａｃｋ" and " black"
    are one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*prompts, render_chat("", DEMO.conditioner)],
        trainers.BpeTrainer(
            vocab_size=1536,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


class WordBreaker:
    """Tokenises prompts like the conditioner, but splits some words into smaller tokens.

    This BPE dropout trains the encoder on the parts that known and unknown words share.
    """

    def __init__(self, conditioner: Conditioner, num_image_tokens: int, share: float = 0.1) -> None:
        self.tokenizer = Tokenizer.from_str(conditioner.tokenizer.to_str())
        self.tokenizer.model.dropout = share
        whole = conditioner.tokenize("", num_image_tokens)
        start = whole.index(conditioner.vision_end_id) + 1
        self.head, self.tail = whole[:start], whole[start:]

    def tokenize(self, prompt: str) -> list[int]:
        """The ids of the whole chat text."""
        return self.head + self.tokenizer.encode(prompt).ids + self.tail


def new_conditioner(tokenizer: Tokenizer) -> Conditioner:
    length = measure_prefix_length(tokenizer, DEMO.conditioner)
    config = replace(DEMO.conditioner, prefix_length=length)
    return Conditioner(Qwen2_5_VLModel(vlm_config(tokenizer)), tokenizer, config)


def vlm_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """A small Qwen2.5-VL for a tokenizer that has the chat's special tokens."""
    ids = {name: special_id(tokenizer, name) for name in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": DEMO.transformer.connector.in_features,
            "intermediate_size": 320,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],  # 16 pairs; the 7B model splits 64 into 16 + 24 + 24
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": DEMO.transformer.connector.in_features,
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


class Pictures:
    """Small pictures as the vision tower takes them, with the colour under each image token."""

    def __init__(
        self, conditioner: Conditioner, gallery: Gallery, rng: np.random.Generator, count: int
    ) -> None:
        crops = [gallery.crop(rng, 112) for _ in range(count)]
        prepared = [conditioner.prepare_image((crop * 255).astype(np.uint8)) for crop in crops]
        self.patches = torch.stack([image.pixel_values for image in prepared])
        self.grid = prepared[0].grid_thw
        self.tokens = prepared[0].num_tokens
        self.colours = F.adaptive_avg_pool2d(to_batch(crops), 2).flatten(2).mT  # (count, 4, 3)


def encode_prompts(
    conditioner: Conditioner, pictures: Pictures, chats: list[list[int]], which: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeds (B, L, C), mask (B, L), image features (B, 4, C): chats about pictures `which`."""
    # Tokens after the kept window cannot change it: attention looks back only.
    seen = conditioner.config.prefix_length + conditioner.config.text_length
    ids, lengths = pad_ids([chat[:seen] for chat in chats])
    grid = pictures.grid.repeat(len(chats), 1)
    features = conditioner.encode_images(pictures.patches[which].flatten(0, 1), grid)
    encoded = conditioner.encode_ids(ids, lengths, features, grid)
    return encoded.prompt_embeds, encoded.prompt_mask, features.unflatten(0, (len(chats), -1))


def train_text(
    work: Path, gallery: Gallery, seed: int, steps: int, corpus: int, judged: int
) -> None:
    """Trains vision-language model and recogniser together to tell which edit a prompt asks for."""
    torch.manual_seed(seed)
    if not (work / "tokenizer.json").exists():
        train_tokenizer([prompt for prompt, _ in demo_prompts.corpus(corpus, seed)]).save(
            str(work / "tokenizer.json")
        )
    conditioner, recogniser = new_text(work)
    labels = demo_prompts.LABELS
    width = recogniser.in_features
    last_head, colour_head = nn.Linear(width, len(labels)), nn.Linear(width, 3)
    model = nn.ModuleDict(
        {"vlm": conditioner.vlm, "recogniser": recogniser, "last": last_head, "colour": colour_head}
    )
    pictures = Pictures(conditioner, gallery, np.random.default_rng(seed), 128)
    breaker = WordBreaker(conditioner, pictures.tokens)
    shares = np.array([4.0 if label == "unknown" else 1.0 for label in labels])
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02
    )
    run = Run(work, "text", model, [optimiser], seed)
    for done in run.steps(steps, minutes=0):
        rng, words = run.rng(), random.Random(f"{seed} {run.step}")
        truth = rng.choice(len(labels), 64, p=shares / shares.sum())
        prompts = [demo_prompts.sample_prompt(labels[label], words) for label in truth]
        chats = [breaker.tokenize(prompt) for prompt in prompts]
        which = rng.integers(len(pictures.patches), size=64)
        embeds, mask, features = encode_prompts(conditioner, pictures, chats, which.tolist())
        target = torch.from_numpy(truth)
        mean = masked_mean(embeds, mask)
        last = embeds[torch.arange(64), mask.sum(1).long() - 1]
        loss = F.cross_entropy(recogniser(mean), target, label_smoothing=0.05)
        loss = loss + 0.5 * F.cross_entropy(last_head(last), target, label_smoothing=0.05)
        loss = loss + 0.2 * F.mse_loss(colour_head(features), pictures.colours[which])
        # Prompts of one edit should look alike to the transformer, whatever their wording.
        centres = torch.zeros(len(labels), width).index_reduce(
            0, target, mean.detach(), "mean", include_self=False
        )
        loss = loss + 0.05 * (mean - centres[target]).pow(2).mean()
        warm_up = min(1, (run.step + 1) / 50)
        run.descend(loss, warm_up * (0.5 + 0.5 * math.cos(math.pi * done)), clip=1.0)
        run.tell(200, loss)
    model.load_state_dict(run.average.values)
    words = random.Random(seed)
    known = [
        (demo_prompts.sample_prompt(label, words), label) for label in labels for _ in range(judged)
    ]
    for name, pairs in (
        ("known words", known),
        ("held-out words", demo_prompts.evaluation_set(judged, seed + 1)),
    ):
        report_recogniser(name, conditioner, recogniser, pictures, pairs)


@torch.inference_mode()
def report_recogniser(
    name: str,
    conditioner: Conditioner,
    recogniser: Recogniser,
    pictures: Pictures,
    pairs: list[tuple[str, str]],
) -> None:
    labels = list(demo_prompts.LABELS)
    found: list[str] = []
    for start in range(0, len(pairs), 64):
        part = [
            conditioner.tokenize(prompt, pictures.tokens) for prompt, _ in pairs[start : start + 64]
        ]
        embeds, mask, _ = encode_prompts(
            conditioner, pictures, part, [i % 128 for i in range(len(part))]
        )
        found += [labels[i] for i in recogniser(masked_mean(embeds, mask)).argmax(-1)]
    truth = [label for _, label in pairs]
    right = np.mean([a == b for a, b in zip(found, truth, strict=True)])
    refused = [a == "unknown" for a, b in zip(found, truth, strict=True) if b == "unknown"]
    wrongly = [a == "unknown" for a, b in zip(found, truth, strict=True) if b != "unknown"]
    print(
        f"recogniser, {name}: accuracy {right:.3f}, unknown recall {np.mean(refused):.3f}, "
        f"known edits called unknown {np.mean(wrongly):.3f} ({len(pairs)} prompts)",
        flush=True,
    )


def new_text(work: Path) -> tuple[Conditioner, Recogniser]:
    conditioner = new_conditioner(Tokenizer.from_file(str(work / "tokenizer.json")))
    width = conditioner.vlm.config.text_config.hidden_size
    return conditioner, Recogniser(width, demo_prompts.LABELS)


def adopt_text(work: Path, start: EditPipeline) -> None:
    """Copies the text encoder of a checkpoint; the stage counts as finished from then on."""
    if (work / "text.pt").exists():
        return
    assert start.recogniser is not None
    model = nn.ModuleDict({"vlm": start.conditioner.vlm, "recogniser": start.recogniser})
    start.conditioner.tokenizer.save(str(work / "tokenizer.json"))
    write(model.state_dict(), work / "text.pt")


def load_text(work: Path) -> tuple[Conditioner, Recogniser]:
    conditioner, recogniser = new_text(work)
    model = nn.ModuleDict({"vlm": conditioner.vlm, "recogniser": recogniser})
    # The two heads that only training needs are left out.
    model.load_state_dict(torch.load(work / "text.pt"), strict=False)
    return conditioner, recogniser


# ------------------------------------------------------------------------------------------------
# Latents: crops and their exact edits, encoded once
# ------------------------------------------------------------------------------------------------


def load_vae(work: Path) -> Autoencoder:
    vae = Autoencoder(VAE_CONFIG)
    vae.load_state_dict(torch.load(work / "vae.pt"))
    return vae.eval().to(memory_format=torch.channels_last)


PRACTICE = {
    "invert": 6.0,
    "bright": 2.0,
    "contrast": 2.0,
    "blur": 2.0,
    "sketch": 3.0,
    "thermal": 3.0,
    "cyberpunk": 3.0,
    "stencil": 3.0,
    "mosaic": 1.5,
    "painting": 2.5,
}
"""How much more often than others (1.0) an edit is drawn for a crop: hard edits are trained more.
No crop shows an edit twice, so invert occurs about two and a half times as often as sepia."""


@torch.inference_mode()
def cache_latents(
    work: Path, gallery: Gallery, seed: int, chunks: int, crops: int, edits: int
) -> None:
    """Writes chunks of float16 latents (crops, 1 + edits, 48, side, side), the crop itself first.

    Every third chunk holds larger crops.
    """
    vae = load_vae(work)
    names = list(EDITS)
    shares = np.array([PRACTICE.get(name, 1.0) for name in names])
    for chunk in range(chunks):
        path = work / f"latents_{chunk:03d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, 7, chunk])
        latents, which = [], []
        for _ in range(crops):
            crop = gallery.crop(rng, 256 if chunk % 3 else 384)
            chosen = rng.choice(len(names), edits, replace=False, p=shares / shares.sum())
            latents.append(encode(vae, [crop, *(EDITS[names[i]](crop) for i in chosen)]).half())
            which.append(chosen)
        write({"latents": torch.stack(latents), "edits": torch.from_numpy(np.stack(which))}, path)
        print(f"latents {chunk + 1}/{chunks}", flush=True)


class LatentCache:
    """All encoded crops, in memory."""

    def __init__(self, work: Path) -> None:
        self.chunks = [torch.load(path) for path in sorted(work.glob("latents_*.pt"))]

    def sample(self, rng: np.random.Generator, size: int, edit: bool) -> tuple[Tensor, Tensor, int]:
        """Reference and target (48, size, size) and the number of the edit, -1 for unchanged."""
        chunks = [chunk for chunk in self.chunks if chunk["latents"].shape[-1] >= size]
        chunk = chunks[int(rng.integers(len(chunks)))]
        row = int(rng.integers(len(chunk["latents"])))
        column = 1 + int(rng.integers(chunk["edits"].shape[1])) if edit else 0
        y, x = (int(v) for v in rng.integers(0, chunk["latents"].shape[-1] - size + 1, 2))
        crop = chunk["latents"][row][:, :, y : y + size, x : x + size].float()
        return crop[0], crop[column], int(chunk["edits"][row][column - 1]) if edit else -1


# ------------------------------------------------------------------------------------------------
# Transformer: start as an exact identity editor
# ------------------------------------------------------------------------------------------------

SPARE = 6.0
"""Constant in the hidden channels that no latent uses. It keeps the deviation inside LayerNorm
nearly the same for all tokens, so that the norm is nearly linear."""


@torch.no_grad()
def start_transformer(seed: int, latent_deviation: float, scale_steps: int) -> Transformer:
    """A transformer that predicts (x_t - reference) / t: the velocity of an unchanged picture.

    Its last block has copy heads: queries and keys are constants, so that only their rotation
    differs, and the scores peak at the reference token in the same place. The final norm's scale is
    fitted to 1/t.
    """
    torch.manual_seed(seed)
    config = DEMO.transformer
    model = Transformer(config)
    width, channels, head = config.hidden_size, config.in_channels, config.head_dim
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        elif "mod.lin" in name or "modulation.lin" in name:
            nn.init.normal_(parameter, std=0.004)
        else:
            nn.init.normal_(parameter, std=min(0.06, parameter.shape[1] ** -0.5))
    model.vector_in.out_layer.weight.mul_(
        0.03
    )  # the prompt must not disturb the fit of 1/t at first
    model.img_in.weight.zero_()
    model.img_in.weight[:channels] = torch.eye(channels)
    spare = torch.arange(width - channels)
    model.img_in.bias[channels:] = SPARE * (1 - 2 * (spare % 2)).float()
    deviation = math.sqrt((channels * latent_deviation**2 + len(spare) * SPARE**2) / width)

    query, key = copy_vectors(config)
    for block in model.double_blocks:
        for stream in (block.img_attn, block.txt_attn):
            stream.proj.weight.mul_(0.15)
        for part in (block.img_mlp, block.txt_mlp):
            part[2].weight.mul_(0.15)
        for modulation in (block.img_mod, block.txt_mod):
            modulation.lin.bias.unflatten(0, (6, width))[[2, 5]] = 0.5
        set_copy_head(block.img_attn.qkv, block.img_attn.norm, 0, query, key, width, head)
    for index, block in enumerate(model.single_blocks):
        is_last = index == config.depth_single - 1
        block.linear2.weight.mul_(0.1)
        block.modulation.lin.bias.unflatten(0, (3, width))[2] = 1.0 if is_last else 0.5
        for number in range(3 if is_last else 1):
            set_copy_head(block.linear1, block.norm, number, query, key, width, head)
        if is_last:
            block.modulation.lin.weight.zero_()
            values = block.linear1.weight[2 * width : 2 * width + channels]
            values.zero_()
            values[:, :channels] = torch.eye(channels)
            block.linear2.weight[:, :channels] = 0
            block.linear2.weight[:channels] *= 0.1
            block.linear2.weight[:channels, :channels] = -deviation * torch.eye(channels)
    model.final_layer.linear.weight.zero_()
    model.final_layer.linear.weight[:, :channels] = torch.eye(channels)
    deviation = deviation_of_difference(latent_deviation, width, channels)
    fit_final_scale(model, deviation, scale_steps)
    return model


def copy_vectors(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """A query and a key whose score, once rotated by place, peaks at the reference's offset."""
    key = torch.zeros(config.head_dim)
    start = 0
    for axis, size in enumerate(config.axes_dim):
        pairs = 1 if axis == 0 else 4  # fewer frequencies would repeat within a large picture
        key[start : start + 2 * pairs : 2] = 1.4 if axis == 0 else 1.0
        start += size
    # score = q R(p_q)^T R(p_k) k: a query turned ahead by the offset meets the key exactly there.
    table = rope_table(torch.ones(1, len(config.axes_dim)), config.axes_dim, config.theta)[
        None, None
    ]
    return apply_rope(key[None, None, None], table).flatten(), key


@torch.no_grad()
def set_copy_head(
    projection: nn.Linear,
    norm: nn.Module,
    number: int,
    query: Tensor,
    key: Tensor,
    width: int,
    head: int,
) -> None:
    for offset, vector in ((0, query), (width, key)):
        rows = slice(offset + number * head, offset + (number + 1) * head)
        projection.weight[rows] = 0
        projection.bias[rows] = vector
    # The scale is shared by all heads of the block; large only in the channels of the copy heads.
    used = (key.abs() + torch.roll(key.abs(), 1)) > 0
    norm.query_norm.scale[used] = 3.6
    norm.key_norm.scale[used] = 3.6


def deviation_of_difference(
    latent_deviation: float, width: int, channels: int
) -> Callable[[Tensor], Tensor]:
    """Deviation inside the final norm at t: x_t - reference has power t² (1 + deviation²)."""

    def at(t: Tensor) -> Tensor:
        power = channels * t**2 * (1 + latent_deviation**2) + (width - channels) * SPARE**2
        return (power / width).sqrt()

    return at


@torch.enable_grad()
def fit_final_scale(model: Transformer, deviation: Callable[[Tensor], Tensor], steps: int) -> None:
    """Fits time embedder and final modulation so that the final norm divides by t."""
    modules = [model.time_in, model.final_layer.adaLN_modulation]
    optimiser = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=3e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps) + 1e-6
        t = torch.rand(256) ** 1.5 * 0.98 + 0.02
        vec = model.time_in(timestep_embedding(t))
        shift, scale = model.final_layer.adaLN_modulation[1](F.silu(vec)).chunk(2, -1)
        wanted = (deviation(t) / t)[:, None]
        error = ((1 + scale) / wanted - 1).pow(2).mean() + shift.pow(2).mean()
        loud = (vec.pow(2).mean() - 1).clamp_min(0)  # every other modulation gets this vector too
        optimiser.zero_grad()
        (error + 0.1 * loud).backward()
        optimiser.step()
    print(f"final scale against 1/t: relative error {float(error.detach()) ** 0.5:.4f}")


# ------------------------------------------------------------------------------------------------
# Transformer: training through the guided velocity
# ------------------------------------------------------------------------------------------------


class PromptCache:
    """Embeddings of many prompts, each about one of a few pictures, and of the empty prompt."""

    def __init__(self, work: Path, gallery: Gallery, seed: int, per_label: int) -> None:
        conditioner, _ = load_text(work)
        pictures = Pictures(conditioner, gallery, np.random.default_rng(seed), 128)
        words = random.Random(seed + 5)
        self.rows: dict[str, list[int]] = {}
        prompts: list[str] = []
        for label in (*EDITS, "identity", "unknown"):
            count = per_label * (6 if label == "unknown" else 1)
            self.rows[label] = list(range(len(prompts), len(prompts) + count))
            prompts += [demo_prompts.sample_prompt(label, words) for _ in range(count)]
        which = [i % 128 for i in range(len(prompts))]
        self.which = which
        self.embeds, self.mask = self._encode(conditioner, pictures, prompts, which)
        self.empty_embeds, self.empty_mask = self._encode(
            conditioner, pictures, [""] * 128, list(range(128))
        )

    @torch.inference_mode()
    def _encode(
        self, conditioner: Conditioner, pictures: Pictures, prompts: list[str], which: list[int]
    ) -> tuple[Tensor, Tensor]:
        chats = [conditioner.tokenize(prompt, pictures.tokens) for prompt in prompts]
        parts = [
            encode_prompts(conditioner, pictures, chats[i : i + 128], which[i : i + 128])[:2]
            for i in range(0, len(prompts), 128)
        ]
        return torch.cat([p[0] for p in parts]).clone(), torch.cat([p[1] for p in parts]).clone()

    def sample(self, rng: np.random.Generator, label: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeds and mask of a prompt that requests `label`, then those of the empty prompt."""
        if label == "empty":
            picture = int(rng.integers(128))
            empty = self.empty_embeds[picture], self.empty_mask[picture]
            return *empty, *empty
        row = self.rows[label][int(rng.integers(len(self.rows[label])))]
        picture = self.which[row]
        return (
            self.embeds[row],
            self.mask[row],
            self.empty_embeds[picture],
            self.empty_mask[picture],
        )


SAMPLES = {4: 19, 6: 13, 8: 8, 12: 4}
"""The batch size for samples of n tokens per side: a roughly constant number of tokens."""


def draw_samples(
    latents: LatentCache, prompts: PromptCache, rng: np.random.Generator, side: int, count: int
) -> dict[str, Tensor]:
    """References, targets, prompts (requested and empty) and places; first axis: the sample."""
    names = list(EDITS)
    reference, target, conditions = [], [], []
    is_unchanged = torch.zeros(count, dtype=torch.bool)
    for index in range(count):
        unchanged = rng.uniform() < 0.14
        is_unchanged[index] = unchanged
        ref, out, edit = latents.sample(rng, 2 * side, not unchanged)
        reference.append(ref)
        target.append(out)
        label = (
            str(rng.choice(["empty", "identity", "unknown", "unknown"]))
            if unchanged
            else names[edit]
        )
        conditions.append(prompts.sample(rng, label))
    ids = image_position_ids(side, side, DEMO.reference_offset).repeat(count, 1, 1)
    for index in range(count):
        if rng.uniform() < 0.25:
            stride, move = (
                float(rng.integers(1, 4)),
                torch.from_numpy(rng.integers(0, 25, 2)).float(),
            )
            offset = torch.cat([torch.zeros(side * side, 1), torch.ones(side * side, 1)])
            grid = ids[index, :, 1:] - offset
            ids[index, :, 1:] = (grid if stride == 1 else grid * stride) + move + offset
    embeds, mask, empty_embeds, empty_mask = (
        torch.stack(part) for part in zip(*conditions, strict=True)
    )
    return {
        "reference": pack(torch.stack(reference)),
        "target": pack(torch.stack(target)),
        "embeds": torch.stack([embeds, empty_embeds], 1),
        "mask": torch.stack([mask, empty_mask], 1),
        "ids": ids,
        "is_unchanged": is_unchanged,
    }


def noised_batch(
    latents: LatentCache, prompts: PromptCache, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Samples at random timesteps, their x_t on the straight line from target to noise."""
    side = int(rng.choice(list(SAMPLES), p=[0.1, 0.3, 0.4, 0.2]))
    count = SAMPLES[side]
    batch = draw_samples(latents, prompts, rng, side, count)
    u = (torch.arange(count) + torch.from_numpy(rng.uniform(size=count)).float()) / count
    t = shift(
        u[torch.from_numpy(rng.permutation(count))].clamp(1e-3, 1), int(rng.integers(256, 1200))
    ).clamp(0.02, 1)
    if rng.uniform() < 0.5:
        t[0] = 1.0
    is_six = torch.from_numpy(rng.uniform(size=count)) < 0.5
    target = batch["target"]
    return batch | {
        "x": add_noise(target, torch.randn_like(target), t[:, None, None]),
        "t": t,
        "scale": torch.where(is_six, 6.0, torch.from_numpy(rng.uniform(1.5, 10, count)).float()),
        "weight": torch.where(is_six, 1.0, 0.5),
    }


def add_noise(clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """Return x_t on the line from `clean` (t = 0) to `noise` (t = 1)."""
    return (1 - t) * clean + t * noise


class Trajectories:
    """A pool of batches on their way from noise to picture, moved by the model itself.

    On the straight line from target to noise, x_t contains the answer, and at small t the model can
    simply copy it. During sampling, x_t contains its own earlier errors instead. The edit is a
    function of reference and prompt, so the right velocity from any x_t is (x_t - target) / t:
    trained on its own states, the model learns to correct its errors. This costs nothing, because
    the velocity that was computed for the loss also makes the next step.

    The pool is not saved: a run that continues after an interruption starts new trajectories.
    """

    LONGEST = 28

    def __init__(
        self, latents: LatentCache, prompts: PromptCache, rng: np.random.Generator
    ) -> None:
        self.latents, self.prompts = latents, prompts
        self.pool = [self._start(rng, side, SAMPLES[side]) for side in (6, 8, 8, 12) * 3]
        # From the first step on the pool contains all timesteps, not only the beginning.
        for batch in self.pool:
            batch["at"] = (torch.rand(len(batch["at"])) * (batch["times"] > 0).sum(1)).long()
            self._look_up_times(batch)
            t = batch["t"][:, None, None]
            batch["x"] = add_noise(batch["target"], batch["x"], t)

    def draw(self, rng: np.random.Generator) -> dict[str, Tensor]:
        return self.pool[int(rng.integers(len(self.pool)))]

    def advance(self, batch: dict[str, Tensor], velocity: Tensor, rng: np.random.Generator) -> None:
        """Moves every sample of a batch by one step; finished ones are replaced by new ones."""
        t, t_next = batch["t"][:, None, None], batch["t_next"][:, None, None]
        batch["x"] = euler_step(batch["x"], velocity, t, t_next)
        batch["at"] = batch["at"] + 1
        arrived = (batch["t_next"] == 0).nonzero().flatten()
        if len(arrived):
            side = math.isqrt(batch["x"].shape[1])
            for key, value in self._start(rng, side, len(arrived)).items():
                batch[key][arrived] = value
        self._look_up_times(batch)

    def _start(self, rng: np.random.Generator, side: int, count: int) -> dict[str, Tensor]:
        batch = draw_samples(self.latents, self.prompts, rng, side, count)
        times = torch.zeros(count, self.LONGEST + 1)
        for index in range(count):
            num_steps = round(math.exp(rng.uniform(math.log(4), math.log(self.LONGEST))))
            times[index, : num_steps + 1] = schedule(num_steps, int(rng.integers(256, 1200)))
        is_six = torch.from_numpy(rng.uniform(size=count)) < 0.7
        batch |= {
            "x": torch.randn_like(batch["target"]),
            "times": times,
            "at": torch.zeros(count, dtype=torch.long),
            "scale": torch.where(is_six, 6.0, torch.from_numpy(rng.uniform(3, 12, count)).float()),
            "weight": torch.where(is_six, 1.0, 0.5),
        }
        self._look_up_times(batch)
        return batch

    @staticmethod
    def _look_up_times(batch: dict[str, Tensor]) -> None:
        samples = torch.arange(len(batch["at"]))
        batch["t"] = batch["times"][samples, batch["at"]]
        batch["t_next"] = batch["times"][samples, batch["at"] + 1]


def guided_loss(model: Transformer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss on the guided velocity, that velocity, and the latents' mean squared error."""
    x, t, scale = batch["x"], batch["t"][:, None, None], batch["scale"][:, None, None]
    velocity = (x - batch["target"]) / t
    tokens = torch.cat([x, batch["reference"]], 1)
    with reduced_precision():
        both = model(
            tokens.repeat(2, 1, 1),
            batch["ids"].repeat(2, 1, 1),
            batch["embeds"].transpose(0, 1).flatten(0, 1),
            batch["mask"].transpose(0, 1).flatten(0, 1),
            batch["t"].repeat(2),
            num_wanted=x.shape[1],
        )
    cond, uncond = both.float().chunk(2)
    guided = guide(cond, uncond, scale, t)
    balance = batch["t"].pow(2) / (batch["t"].pow(2) + 0.25**2)

    def distance(error: Tensor) -> Tensor:
        # Quality is judged in dB, edit by edit. The root keeps hard edits from outvoting the rest.
        return (balance * error + 1e-4).sqrt()

    error = (guided - velocity).pow(2).mean((1, 2))
    # The mean colour of a token decides whether flat areas look flat.
    cell = (guided - velocity).unflatten(-1, (-1, 4)).mean(-1).pow(2).mean((1, 2))
    loss = (batch["weight"] * distance(error + 0.5 * cell)).mean()
    loss = loss + (distance((uncond - velocity).pow(2).mean((1, 2))) * batch["is_unchanged"]).mean()
    loss = loss + 0.05 * distance((cond - velocity).pow(2).mean((1, 2))).mean()
    return loss, guided.detach(), (error * batch["t"].pow(2)).detach()


def transformer_optimisers(model: Transformer, pace: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, Adam for the rest, slow for the identity's weights."""
    muon, adam, slow = [], [], []
    for name, parameter in model.named_parameters():
        inside = "blocks" in name and "mod" not in name and not name.startswith("connector")
        if inside and parameter.ndim == 2:
            muon.append(parameter)
        elif parameter.ndim < 2 or name.startswith(("img_in", "final_layer")):
            slow.append(parameter)
        else:
            adam.append(parameter)
    return [
        torch.optim.Muon(
            muon, lr=pace * 1e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": adam, "lr": pace * 8e-4}, {"params": slow, "lr": pace * 2.4e-4}],
            betas=(0.9, 0.97),
            weight_decay=0.0,
        ),
    ]


def train_transformer(
    work: Path,
    gallery: Gallery,
    seed: int,
    scale_steps: int,
    steps: int,
    minutes: float,
    per_label: int,
    start: Transformer | None,
) -> None:
    latents = LatentCache(work)
    prompts = PromptCache(work, gallery, seed, per_label)
    if start:
        model, pace = start.requires_grad_(True), 0.7
    else:
        latent_deviation = float(latents.chunks[0]["latents"].float().std())
        model, pace = start_transformer(seed, latent_deviation, scale_steps), 1
    run = Run(work, "transformer", model, transformer_optimisers(model, pace), seed, decay=0.997)
    trajectories = Trajectories(latents, prompts, run.rng())
    errors: dict[str, float] = {}
    for done in run.steps(steps, minutes):
        rng = run.rng()
        is_own = rng.uniform() < 0.75
        batch = trajectories.draw(rng) if is_own else noised_batch(latents, prompts, rng)
        loss, velocity, error = guided_loss(model, batch)
        for late, chosen in (("early", batch["t"] > 0.5), ("late", batch["t"] <= 0.5)):
            if chosen.any():
                key, value = f"{'own' if is_own else 'noised'} {late}", float(error[chosen].mean())
                errors[key] = 0.98 * errors.get(key, value) + 0.02 * value
        factor = min(1, (run.step + 1) / 50) * min(1, (1 - done) / 0.65)
        run.descend(loss, factor, clip=2.0)
        if is_own:
            trajectories.advance(batch, velocity, rng)
        run.tell(100, loss, lambda: {key: round(value, 4) for key, value in errors.items()})


# ------------------------------------------------------------------------------------------------
# Decoder: its real inputs
# ------------------------------------------------------------------------------------------------


def load_transformer(work: Path) -> Transformer:
    model = Transformer(DEMO.transformer)
    model.load_state_dict(torch.load(work / "transformer.pt"))
    return model.eval()


@torch.no_grad()
def sampled_latents(
    model: Transformer,
    prompts: PromptCache,
    rng: np.random.Generator,
    reference: Tensor,
    labels: list[str],
    num_steps: int = 5,
) -> Tensor:
    """The latents that the transformer makes from noise for these prompts, in a few steps."""
    rows, columns = reference.shape[2] // 2, reference.shape[3] // 2
    embeds, mask, empty_embeds, empty_mask = (
        torch.stack(part)
        for part in zip(*(prompts.sample(rng, label) for label in labels), strict=True)
    )
    known = pack(reference)
    x = torch.randn_like(known)
    ids = image_position_ids(rows, columns, DEMO.reference_offset)
    timesteps = schedule(num_steps, 256).tolist()
    for t, t_next in itertools.pairwise(timesteps):
        with reduced_precision():
            both = model(
                torch.cat([x, known], 1).repeat(2, 1, 1),
                ids,
                torch.cat([embeds, empty_embeds]),
                torch.cat([mask, empty_mask]),
                torch.full((2 * len(labels),), t),
                num_wanted=x.shape[1],
            )
        cond, uncond = both.float().chunk(2)
        x = euler_step(x, guide(cond, uncond, 6.0, t), t, t_next)
    return unpack(x, rows, columns)


def train_decoder(
    work: Path, gallery: Gallery, seed: int, steps: int, minutes: float, per_label: int
) -> None:
    """Trains the decoder alone: two batches in three on exact latents, else the transformer's."""
    vae = load_vae(work)
    transformer = load_transformer(work)
    prompts = PromptCache(work, gallery, seed, max(1, per_label // 10))
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(
        vae.decoder.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0
    )
    run = Run(work, "decoder", vae, [optimiser], seed)
    names = list(EDITS)
    for done in run.steps(steps, minutes):
        rng = run.rng()
        size, count = (256, 2) if run.step % 2 else (128, 8)
        crops = [gallery.crop(rng, size) for _ in range(count)]
        labels = [
            "empty" if rng.uniform() < 0.4 else names[int(rng.integers(len(names)))] for _ in crops
        ]
        edited = [
            crop if label == "empty" else EDITS[label](crop)
            for crop, label in zip(crops, labels, strict=True)
        ]
        latents = encode(vae, edited)
        if run.step % 3 == 2:
            latents = sampled_latents(transformer, prompts, rng, encode(vae, crops), labels)
        with reduced_precision():
            out = vae.decode(latents)
        loss = picture_loss(out.float(), to_batch(edited))
        run.descend(loss, min(1, (run.step + 1) / 50) * (1 - done) ** 0.7, clip=1.0)
        run.tell(200, loss, lambda: judge(run))


@torch.no_grad()
def encode(vae: Autoencoder, pictures: list[np.ndarray]) -> Tensor:
    """Pictures in 0..1 to latents (B, 48, H/16, W/16)."""
    with reduced_precision():
        batch = to_batch(pictures).to(memory_format=torch.channels_last)
        return vae.encode(batch).float()


# ------------------------------------------------------------------------------------------------


def export(work: Path, folder: Path) -> None:
    """Writes the checkpoint as the package contains it."""
    conditioner, recogniser = load_text(work)
    vae = load_vae(work)
    if (work / "decoder.pt").exists():
        vae.load_state_dict(torch.load(work / "decoder.pt"))
    config = replace(DEMO, conditioner=conditioner.config)
    write_demo(folder, EditPipeline(load_transformer(work), vae, conditioner, config, recogniser))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"wrote {folder} ({size:.2f} MB)")


@dataclass(frozen=True)
class Plan:
    """The amounts of a run."""

    drawn_pictures: int = 240
    start_crops: int = 600
    vae_steps: int = 6000
    corpus: int = 1500
    text_steps: int = 7500
    judged_prompts: int = 50
    latent_chunks: int = 24
    latent_crops: int = 100
    latent_edits: int = 12
    prompts_per_label: int = 300
    scale_steps: int = 1200
    transformer_steps: int = 9000
    decoder_steps: int = 2000


CONTINUATION = Plan(
    vae_steps=2700, latent_chunks=5, latent_edits=12, transformer_steps=2300, decoder_steps=600
)
"""The settings that `--start-from` changes: as much as the embedded file got."""

SMOKE = Plan(
    drawn_pictures=4,
    start_crops=24,
    vae_steps=3,
    corpus=30,
    text_steps=3,
    judged_prompts=2,
    latent_chunks=1,
    latent_crops=2,
    latent_edits=2,
    prompts_per_label=2,
    scale_steps=200,
    transformer_steps=3,
    decoder_steps=3,
)
"""Three steps of everything, to check that the recipe still runs."""

STAGES = ("vae", "text", "latents", "transformer", "decoder", "export")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for intermediate results")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint; default: in --work")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--start-from", type=Path, help="a demo checkpoint's folder, to continue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=0, help="limit for each training stage; 0 = by steps only"
    )
    parser.add_argument("--smoke", action="store_true", help="three steps of each stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    seed, minutes = arguments.seed, arguments.minutes
    work = arguments.work or Path("build") / ("smoke" if arguments.smoke else "demo")
    stages = arguments.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {', '.join(sorted(unknown))}; known: {', '.join(STAGES)}")
    plan = CONTINUATION if arguments.start_from else Plan()
    plan = SMOKE if arguments.smoke else plan
    torch.set_num_threads(arguments.threads)
    work.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(seed, plan.drawn_pictures)
    start = None
    if arguments.start_from:
        start = read_checkpoint(arguments.start_from).pipeline
        adopt_text(work, start)

    def is_due(stage: str) -> bool:
        return stage in stages and not (work / f"{stage}.pt").exists()

    if is_due("vae"):
        vae = start.vae if start else None
        train_vae(work, gallery, seed, plan.vae_steps, minutes, plan.start_crops, vae)
    if is_due("text"):
        train_text(work, gallery, seed, plan.text_steps, plan.corpus, plan.judged_prompts)
    if is_due("latents"):
        cache_latents(work, gallery, seed, plan.latent_chunks, plan.latent_crops, plan.latent_edits)
    if is_due("transformer"):
        transformer = start.transformer if start else None
        train_transformer(
            work,
            gallery,
            seed,
            plan.scale_steps,
            plan.transformer_steps,
            minutes,
            plan.prompts_per_label,
            transformer,
        )
    if is_due("decoder"):
        train_decoder(work, gallery, seed, plan.decoder_steps, minutes, plan.prompts_per_label)
    if "export" in stages:
        export(work, arguments.out or work / "checkpoint")


if __name__ == "__main__":
    main()
