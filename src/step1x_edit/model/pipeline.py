"""The pipeline: a picture and an instruction go in, progress and the edited picture come out.

Three stages: *encode* (reference latents, hidden states of both prompts), *prologue* (whatever the
transformer needs to know of all timesteps) and the *core loop*, which yields after each step, so
that progress and cancellation need no callback. It knows nothing of files, queues or devices'
memory; mistakes of a caller are `ValueError`s.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from step1x_edit.model.conditioner import Conditioner, PromptEncoding
from step1x_edit.model.config import PATCH_SIZE, ModelConfig
from step1x_edit.model.connector import masked_mean
from step1x_edit.model.flow import euler_step, guide, schedule
from step1x_edit.model.latents import draw_noise, fit_size, image_position_ids, pack, unpack
from step1x_edit.model.transformer import PrologueStep, Transformer

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), upright RGB


@dataclass(frozen=True)
class EditRequest:
    """One edit as the network sees it; at guidance 1.0 the negative prompt has no say."""

    image: Pixels
    prompt: str
    negative_prompt: str = ""
    num_steps: int = 28
    guidance_scale: float = 6.0
    size_level: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Step `step` of `total` of a phase; a step of denoising is reported when it is done."""

    phase: Literal["encoding", "denoising", "decoding"]
    step: int
    total: int


@dataclass(frozen=True)
class Edited:
    """The picture at the size it was edited in, and how its prompt was understood."""

    image: Pixels
    label: str | None = None
    is_prompt_cut: bool = False
    """Whether the end of the prompt was beyond what the checkpoint reads."""


@dataclass(frozen=True)
class Encoded:
    """The output of the first stage. Two rows where there is guidance, prompt first; else one."""

    reference: Tensor  # (1, N, C) tokens
    prompt: PromptEncoding  # (B, L, C) and (B, L)
    rows: int
    columns: int
    is_prompt_cut: bool = False


@dataclass(frozen=True)
class DenoiseState:
    """All that the core loop carries from step to step; the loop can go on from any of them."""

    latents: Tensor  # (1, N, C) tokens, float32
    step: int  # steps done


class Recogniser(nn.Linear):
    """Names the edit that a prompt asks for, from the mean of its states."""

    def __init__(self, in_features: int, labels: Sequence[str]) -> None:
        super().__init__(in_features, len(labels))
        self.labels = tuple(labels)

    def recognise(self, prompt: PromptEncoding) -> str:
        """The likeliest label for one prompt, (L, C) and (L)."""
        mean = masked_mean(prompt.prompt_embeds[None].float(), prompt.prompt_mask[None])  # (1, C)
        return self.labels[int(self(mean.to(self.weight.dtype)).argmax())]


class EditPipeline:
    """Owns the networks of one checkpoint and runs edits with them, one at a time."""

    def __init__(
        self,
        transformer: Transformer,
        vae: AutoencoderKL,
        conditioner: Conditioner,
        config: ModelConfig,
        recogniser: Recogniser | None = None,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.conditioner = conditioner
        self.config = config
        self.recogniser = recogniser

    @torch.inference_mode()
    def edit(self, request: EditRequest) -> Generator[Progress | Edited, None, None]:
        """Yield progress and, last, the edited picture; closing the generator stops the work.

        Raises ValueError for a picture that is too narrow and FloatingPointError when the numbers
        overflow.
        """
        if request.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {request.num_steps}")
        yield Progress("encoding", 0, 1)
        encoded = self.encode(request)
        label = self._label(encoded)
        start = self.start(encoded, request.seed)
        for state in self.denoise(encoded, start, request):
            yield Progress("denoising", state.step, request.num_steps)
        yield Progress("decoding", 0, 1)
        yield Edited(self.decode(state, encoded), label, encoded.is_prompt_cut)

    @torch.inference_mode()
    def recognise(self, prompt: str, image: Pixels) -> str | None:
        """Name the edit that the prompt asks for; None if the checkpoint has no recogniser."""
        if self.recogniser is None:
            return None
        return self.recogniser.recognise(self.conditioner.encode(prompt, image))

    def encode(self, request: EditRequest) -> Encoded:
        """Look at the picture once, as latents and, with the prompts, as hidden states."""
        multiple = self.config.size_multiple
        height, width = request.image.shape[:2]
        size = fit_size(width, height, request.size_level, multiple)
        picture = Image.fromarray(request.image).resize(size, Image.Resampling.LANCZOS)
        image = np.asarray(picture)
        prompts = [request.prompt]
        if request.guidance_scale != 1.0:
            prompts.append(request.negative_prompt)
        return Encoded(
            reference=pack(self._encode_latents(image)),
            prompt=self.conditioner.encode_many(prompts, image),
            rows=size[1] // multiple,
            columns=size[0] // multiple,
            is_prompt_cut=self.conditioner.cuts(request.prompt, image),
        )

    def start(self, encoded: Encoded, seed: int) -> DenoiseState:
        """The noise that the seed stands for."""
        rows, columns = encoded.rows * PATCH_SIZE, encoded.columns * PATCH_SIZE
        noise = draw_noise((1, self.config.latent_channels, rows, columns), seed)
        return DenoiseState(pack(noise), step=0)

    def denoise(
        self, encoded: Encoded, start: DenoiseState, request: EditRequest
    ) -> Generator[DenoiseState, None, None]:
        """Run the steps that remain, and yield after each."""
        device, dtype = self._device, self._dtype
        timesteps = schedule(request.num_steps, encoded.rows * encoded.columns)
        embeds, mask = encoded.prompt
        prologue = self.transformer.prologue(
            embeds.to(device, dtype), mask.to(device), timesteps[:-1].to(device)
        )
        ids = image_position_ids(encoded.rows, encoded.columns, self.config.reference_offset)
        rope = self.transformer.rope(ids.to(device), embeds.shape[1])
        latents, reference = start.latents.to(device), encoded.reference.to(device)
        times = timesteps.tolist()
        for index in range(start.step, request.num_steps):
            t, t_next = times[index], times[index + 1]
            velocity = self._velocity(latents, reference, prologue[index], rope)
            if request.guidance_scale != 1.0:
                cond, uncond = velocity.chunk(2)
                velocity = guide(cond, uncond, request.guidance_scale, t, self.config.guidance_rule)
            latents = euler_step(latents, velocity, t, t_next)
            yield DenoiseState(latents, step=index + 1)

    def decode(self, state: DenoiseState, encoded: Encoded) -> Pixels:
        """Turn latents into a picture."""
        if not bool(torch.isfinite(state.latents).all()):
            raise FloatingPointError("the edit produced numbers that are not finite")
        latents = unpack(state.latents, encoded.rows, encoded.columns)
        z = latents / self.config.latent_scale + self.config.latent_shift
        decoded = self.vae.decode(z.to(self.vae.device, self.vae.dtype)).sample[0]  # (3, H, W)
        pixels = (decoded.float().clamp(-1, 1) + 1) * 127.5
        image: Pixels = pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        return image

    def _encode_latents(self, image: Pixels) -> Tensor:
        """The reference latents (1, C, H, W): the mode, not a sample, so that runs repeat."""
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0)
        scaled = pixels.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        z: Tensor = self.vae.encode(scaled).latent_dist.mode().float()
        return (z - self.config.latent_shift) * self.config.latent_scale

    def _velocity(
        self, latents: Tensor, reference: Tensor, step: PrologueStep, rope: Tensor
    ) -> Tensor:
        """The velocity of the latents in float32, (B, N, C), for one or both prompts."""
        img = torch.cat([latents, reference], dim=1).expand(step.txt.shape[0], -1, -1)
        wanted = latents.shape[1]  # the reference tokens' velocity is of no use
        return self.transformer.core(img.to(self._dtype), step, rope, num_wanted=wanted).float()

    def _label(self, encoded: Encoded) -> str | None:
        if self.recogniser is None:
            return None
        embeds, mask = encoded.prompt
        return self.recogniser.recognise(PromptEncoding(embeds[0], mask[0]))

    @property
    def _device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype
