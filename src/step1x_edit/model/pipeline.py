"""The pipeline: a picture and an instruction go in, progress and the edited picture come out.

Three stages: *encode* (reference latents, hidden states of both prompts), *prologue* (whatever the
transformer needs to know of all timesteps) and the *core loop*, which yields after each step, so
that progress and cancellation need no callback. It knows nothing of files, queues or devices'
memory; mistakes of a caller are `ValueError`s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

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
from step1x_edit.model.latents import draw_noise, image_position_ids, pack, unpack
from step1x_edit.model.sizes import fit_size
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
    preview_steps: frozenset[int] = frozenset()
    """The steps whose prediction is shown as a picture; the result does not depend on them."""


@dataclass(frozen=True)
class Progress:
    """Step `step` of `total` of a phase; a step of denoising is reported when it is done."""

    phase: Literal["encoding", "denoising", "decoding"]
    step: int
    total: int
    preview: Pixels | None = field(default=None, compare=False, repr=False)
    """The picture as predicted at this step, where one was asked for."""


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
    predicted: Tensor | None = None  # (1, N, C), where the last step's velocity leads at t = 0


@dataclass
class EditRun:
    """An edit under way; it keeps what has been done, so that it can go on after a failure."""

    request: EditRequest
    encoded: Encoded | None = None
    state: DenoiseState | None = None
    steps_told: int = 0


@dataclass(frozen=True)
class Plan:
    """How an edit spends memory."""

    has_joint_branches: bool = True
    """Whether prompt and negative prompt run as one batch rather than one after the other."""
    has_vae_tiles: bool = False
    """Whether the autoencoder sees pictures larger than `VAE_TILE` in overlapping tiles.

    Its normalisation then sees a tile instead of the picture. Up to one tile nothing changes; at
    1024 the demo's pixels differ by 0.8 of 255 in the mean.
    """


PLANS: Final = (Plan(), Plan(has_joint_branches=False, has_vae_tiles=True))
"""From the fastest to the one that needs the least memory."""

VAE_TILE: Final = 512
"""Side of a tile in pixels."""


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

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names that they have in checkpoints."""
        return {
            "transformer": self.transformer,
            "vae": self.vae,
            "conditioner": self.conditioner.vlm,
            **({"recogniser": self.recogniser} if self.recogniser else {}),
        }

    def edit(self, request: EditRequest) -> Generator[Progress | Edited, None, None]:
        """Yield progress and, last, the edited picture; closing the generator stops the work.

        Raises ValueError for a picture that is too narrow and FloatingPointError when the numbers
        overflow.
        """
        return self.advance(EditRun(request), PLANS[0])

    @torch.inference_mode()
    def advance(self, run: EditRun, plan: Plan) -> Generator[Progress | Edited, None, None]:
        """Do what remains of a run, as `edit` does; the run keeps each step that is done.

        After a failure, such as memory running out, the same run may be advanced under another
        plan: neither the encoding nor a step is done twice.
        """
        request = run.request
        if request.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {request.num_steps}")
        if run.encoded is None:
            yield Progress("encoding", 0, 1)
            run.encoded = self.encode(request, plan)
        label = self._label(run.encoded)
        if run.state is None:
            run.state = self.start(run.encoded, request.seed)
        if run.state.step > run.steps_told:  # it was its preview that failed
            yield self._tell(run, run.state, run.encoded, plan)
        for state in self.denoise(run.encoded, run.state, request, plan):
            run.state = state
            yield self._tell(run, state, run.encoded, plan)
        yield Progress("decoding", 0, 1)
        image = self.decode(run.state.latents, run.encoded, plan)
        yield Edited(image, label, run.encoded.is_prompt_cut)

    @torch.inference_mode()
    def recognise(self, prompt: str, image: Pixels) -> str | None:
        """Name the edit that the prompt asks for; None if the checkpoint has no recogniser."""
        if self.recogniser is None:
            return None
        return self.recogniser.recognise(self.conditioner.encode(prompt, image))

    def encode(self, request: EditRequest, plan: Plan = PLANS[0]) -> Encoded:
        """Look at the picture once, as latents and, with the prompts, as hidden states."""
        multiple = self.config.size_multiple
        height, width = request.image.shape[:2]
        size = fit_size(width, height, request.size_level, multiple)
        picture = Image.fromarray(request.image).resize(size, Image.Resampling.LANCZOS)
        image = np.asarray(picture)
        prompts = [request.prompt]
        if request.guidance_scale != 1.0:
            prompts.append(request.negative_prompt)
        with self._tiles(plan):
            reference = pack(self._encode_latents(image))
        return Encoded(
            reference=reference,
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
        self, encoded: Encoded, start: DenoiseState, request: EditRequest, plan: Plan = PLANS[0]
    ) -> Generator[DenoiseState, None, None]:
        """Run the steps that remain, and yield after each."""
        if start.step == request.num_steps:
            return
        device, dtype = self._device, self._dtype
        timesteps = schedule(request.num_steps, encoded.rows * encoded.columns)
        embeds, mask = encoded.prompt
        rows = embeds.shape[0] if plan.has_joint_branches else 1
        prologues = [
            self.transformer.prologue(
                some_embeds.to(device, dtype), some_mask.to(device), timesteps[:-1].to(device)
            )
            for some_embeds, some_mask in zip(
                torch.split(embeds, rows), torch.split(mask, rows), strict=True
            )
        ]
        ids = image_position_ids(encoded.rows, encoded.columns, self.config.reference_offset)
        rope = self.transformer.rope(ids.to(device), embeds.shape[1])
        latents, reference = start.latents.to(device), encoded.reference.to(device)
        times = timesteps.tolist()
        for index in range(start.step, request.num_steps):
            t, t_next = times[index], times[index + 1]
            velocity = torch.cat(
                [
                    self._velocity(latents, reference, prologue[index], rope)
                    for prologue in prologues
                ]
            )
            if request.guidance_scale != 1.0:
                cond, uncond = velocity.chunk(2)
                velocity = guide(cond, uncond, request.guidance_scale, t, self.config.guidance_rule)
            predicted = euler_step(latents, velocity, t, 0.0)
            latents = euler_step(latents, velocity, t, t_next)
            yield DenoiseState(latents, index + 1, predicted)

    def decode(self, latents: Tensor, encoded: Encoded, plan: Plan = PLANS[0]) -> Pixels:
        """Turn latents, (1, N, C) tokens, into a picture."""
        _check_finite(latents)
        latents = unpack(latents, encoded.rows, encoded.columns)
        z = latents / self.config.latent_scale + self.config.latent_shift
        with self._tiles(plan):
            decoded = self.vae.decode(z.to(self.vae.device, self.vae.dtype)).sample[0]  # (3, H, W)
        _check_finite(decoded)
        pixels = (decoded.float().clamp(-1, 1) + 1) * 127.5
        image: Pixels = pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        return image

    def _tell(self, run: EditRun, state: DenoiseState, encoded: Encoded, plan: Plan) -> Progress:
        """The report of a step that is done, with its preview if there is to be one."""
        preview = None
        if state.predicted is not None and state.step in run.request.preview_steps:
            preview = self.decode(state.predicted, encoded, plan)
        run.steps_told = state.step
        return Progress("denoising", state.step, run.request.num_steps, preview)

    @contextlib.contextmanager
    def _tiles(self, plan: Plan) -> Iterator[None]:
        """The autoencoder in tiles, where the plan says so; afterwards it is as it was."""
        vae = self.vae
        before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
        if plan.has_vae_tiles:
            vae.enable_tiling()
            vae.tile_sample_min_size = VAE_TILE
            vae.tile_latent_min_size = VAE_TILE // self.config.vae_scale
        try:
            yield
        finally:
            vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before

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


def _check_finite(numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise FloatingPointError("the edit produced numbers that are not finite")
