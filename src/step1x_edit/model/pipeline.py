"""The pipeline: a picture and an instruction go in, progress and the edited picture come out.

Some checkpoints also make a picture from words alone, by the same stages without a reference.

Three stages: *encode* (reference latents, hidden states of both prompts), *prologue* (whatever the
transformer needs to know of all timesteps) and the *core loop*, which yields after each step, so
that progress and cancellation need no callback. It knows nothing of files, queues or devices'
memory; mistakes of a caller are `ValueError`s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.blocks import Layout, widen
from step1x_edit.model.conditioner import Conditioner, PromptEncoding
from step1x_edit.model.conditioner_v1_2 import ConditionerV12, PromptEncodingV12
from step1x_edit.model.config import PATCH_SIZE, ModelConfig, ReferenceResize
from step1x_edit.model.connector import masked_mean
from step1x_edit.model.flow import euler_step, guide, schedule
from step1x_edit.model.latents import (
    draw_noise,
    image_position_ids,
    pack,
    position_ids,
    unpack,
)
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.rope import RecentTables
from step1x_edit.model.savings import ALL, Savings
from step1x_edit.model.sizes import fit_size
from step1x_edit.model.sketch import Pairs, Sketch, chart
from step1x_edit.model.transformer import Prologue, PrologueStep, QuotedText, Transformer


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
    cut: tuple[str, ...] = ()
    """Which of prompt and negative prompt the checkpoint did not read to its end."""


@dataclass(frozen=True)
class Branch:
    """A prompt as the transformer takes it, or several in one batch (`join`)."""

    embeds: Tensor  # (B, L, C), the conditioner's states
    mask: Tensor  # (B, L) of 0 and 1
    quoted: QuotedText | None = None
    txt_ids: Tensor | None = None  # (L, 3); without them all tokens stand at the origin
    pad_copies: int = 0
    """So many rows of padding more there would be, all like the last one."""


def join(branches: Sequence[Branch]) -> Branch:
    """Branches of one length, without places of their own, as one batch."""
    return Branch(
        torch.cat([branch.embeds for branch in branches]),
        torch.cat([branch.mask for branch in branches]),
        pad_copies=branches[0].pad_copies,
    )


def keep_one_pad(branches: Sequence[Branch]) -> Sequence[Branch]:
    """Cut prompts behind the first row that is padding in all of them; it stands for the rest.

    They stay equally long. A prompt that fills its rows, and each of v1.2 does, leaves nothing to
    cut in any.
    """
    # Counted, not added up: the masks of a bfloat16 network cannot tell 353 from 352.
    kept = max(int(branch.mask.count_nonzero(dim=1).max()) for branch in branches) + 1
    return [
        replace(
            branch,
            embeds=branch.embeds[:, :kept],
            mask=branch.mask[:, :kept],
            pad_copies=max(0, branch.mask.shape[1] - kept),
        )
        for branch in branches
    ]


@dataclass(frozen=True)
class Encoded:
    """The output of the first stage."""

    reference: Tensor  # (1, N, C) tokens; (1, 0, C) if there is no picture
    branches: tuple[Branch, ...]
    """The prompt's and, where there is guidance, the negative prompt's."""
    rows: int
    columns: int
    cut: tuple[str, ...] = ()
    """As in `Edited`."""
    sketch: Sketch | None = None
    """How previews are made, if there are to be any."""


@dataclass(frozen=True)
class DenoiseState:
    """All that the core loop carries from step to step; the loop can go on from any of them."""

    latents: Tensor  # (1, N, C) tokens, float32
    step: int  # steps done
    predicted: Tensor | None = None  # (1, N, C), where the last step's velocity leads at t = 0


@dataclass
class EditRun:
    """An edit under way; it keeps what has been done, so that it can go on after a failure."""

    request: NetworkRequest
    encoded: Encoded | None = None
    label: str | None = None
    """The edit that the prompt asks for, once it is encoded, if there is a recogniser."""
    state: DenoiseState | None = None
    steps_told: int = 0


@dataclass(frozen=True)
class Plan:
    """How an edit spends memory."""

    has_joint_branches: bool = True
    """Whether prompt and negative prompt run as one batch rather than one after the other.

    Those of v1.2 differ in length and never do.
    """
    has_vae_tiles: bool = False
    """Whether the autoencoder sees pictures larger than `VAE_TILE` in overlapping tiles.

    Its normalisation then sees a tile instead of the picture. Up to one tile nothing changes; at
    1024 the demo's pixels differ by 0.8 of 255 in the mean.
    """


PLANS: Final = (Plan(), Plan(has_joint_branches=False, has_vae_tiles=True))
"""From the fastest to the one that needs the least memory."""

VAE_TILE: Final = 512
"""Side of a tile in pixels."""

BLACK_SIDE: Final = 1024
"""Side of the black picture that the conditioner is shown where there is none, whatever is made."""


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
        vae: Autoencoder,
        conditioner: Conditioner | ConditionerV12,
        config: ModelConfig,
        recogniser: Recogniser | None = None,
        savings: Savings = ALL,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.conditioner = conditioner
        self.config = config
        self.recogniser = recogniser
        self.savings = savings
        self._tables = RecentTables()
        self._chart: Pairs | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names that they have in checkpoints."""
        return {
            "transformer": self.transformer,
            "vae": self.vae,
            "conditioner": self.conditioner.vlm,
            **({"recogniser": self.recogniser} if self.recogniser else {}),
        }

    def forget_tables(self) -> None:
        """Give back the device's memory that is kept from edit to edit; it is not missed."""
        self._tables.clear()

    def edit(self, request: NetworkRequest) -> Generator[Progress | Edited, None, None]:
        """Yield progress and, last, the edited picture; closing the generator stops the work.

        Raises ValueError for a picture that is too narrow, for one that this checkpoint cannot
        make, and FloatingPointError when the numbers overflow.
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
        run.label = self._name(run.encoded.branches[0])
        if run.state is None:
            run.state = self.start(run.encoded, request.seed, request.draw)
        if run.state.step > run.steps_told:  # it was its preview that failed
            yield self._tell(run, run.state, run.encoded)
        for state in self.denoise(run.encoded, run.state, request, plan):
            run.state = state
            yield self._tell(run, state, run.encoded)
        yield Progress("decoding", 0, 1)
        image = self.decode(run.state.latents, run.encoded, plan)
        yield Edited(image, run.label, run.encoded.cut)

    @torch.inference_mode()
    def recognise(self, prompt: str, image: Pixels) -> str | None:
        """Name the edit that the prompt asks for; None if the checkpoint has no recogniser."""
        if self.recogniser is None:
            return None
        (branch,) = self._read([prompt], image)
        return self._name(branch)

    def encode(self, request: NetworkRequest, plan: Plan = PLANS[0]) -> Encoded:
        """Look at the picture once, as latents and, with the prompts, as hidden states."""
        if request.image is None:
            return self._encode_words(request)
        multiple = self.config.size_multiple
        height, width = request.image.shape[:2]
        size = fit_size(width, height, request.size_level, multiple)
        picture = Image.fromarray(request.image).resize(size, Image.Resampling.LANCZOS)
        image = np.asarray(picture)
        match self.config.reference_resize:
            case ReferenceResize.LANCZOS:
                pixels = _as_tensor(image)
            case ReferenceResize.BILINEAR:
                pixels = F.interpolate(
                    _as_tensor(request.image).float(), size[::-1], mode="bilinear", antialias=True
                )
        with self._tiles(plan):
            latents = self._encode_latents(pixels)
        return Encoded(
            reference=pack(latents),
            branches=self._read(self._prompts(request), image),
            rows=size[1] // multiple,
            columns=size[0] // multiple,
            cut=self._cut(request, image),
            sketch=self._sketch(request, (latents, pixels)),
        )

    def _encode_words(self, request: NetworkRequest) -> Encoded:
        """The prompts alone, about a black picture: the latents have none beside them."""
        multiple, sides = self.config.size_multiple, (request.width, request.height)
        if not self.config.can_generate:
            raise ValueError(f"{self.config.version} makes no pictures from words alone")
        if min(sides) < multiple or any(side % multiple for side in sides):
            raise ValueError(f"width and height must be multiples of {multiple}, not {sides}")
        black = np.zeros((BLACK_SIDE, BLACK_SIDE, 3), np.uint8)
        return Encoded(
            reference=torch.empty(1, 0, self.transformer.config.in_channels),
            branches=self._read(self._prompts(request), black),
            rows=request.height // multiple,
            columns=request.width // multiple,
            cut=self._cut(request, black),
            sketch=self._sketch(request),
        )

    def _sketch(self, request: NetworkRequest, *pictures: tuple[Tensor, Tensor]) -> Sketch | None:
        """The layer for previews, if any are wanted, from pictures as latents and as pixels."""
        if not request.preview_steps:
            return None
        if self._chart is None:
            self._chart = Pairs.of(self._encode_latents(chart()), chart())
        return sum((Pairs.of(*picture) for picture in pictures), self._chart).fit()

    def _prompts(self, request: NetworkRequest) -> list[str]:
        """The prompt and, where there is guidance, the negative prompt."""
        if request.guidance_scale == 1.0:
            return [request.prompt]
        negative = request.negative_prompt
        if negative is None and request.image is None:
            negative = self.config.generation_negative_prompt
        return [request.prompt, negative or ""]

    def _cut(self, request: NetworkRequest, image: Pixels) -> tuple[str, ...]:
        """Which of the prompts about the picture are not read to their ends."""
        prompts = zip(("prompt", "negative prompt"), self._prompts(request), strict=False)
        return tuple(name for name, prompt in prompts if self.conditioner.cuts(prompt, image))

    def start(self, encoded: Encoded, seed: int, draw: int = 0) -> DenoiseState:
        """The noise that the seed stands for; `draw` as in `draw_noise`."""
        rows, columns = encoded.rows * PATCH_SIZE, encoded.columns * PATCH_SIZE
        noise = draw_noise((1, self.config.latent_channels, rows, columns), seed, draw)
        return DenoiseState(pack(noise), step=0)

    def denoise(
        self, encoded: Encoded, start: DenoiseState, request: NetworkRequest, plan: Plan = PLANS[0]
    ) -> Generator[DenoiseState, None, None]:
        """Run the steps that remain, and yield after each."""
        if start.step == request.num_steps:
            return
        device = self._device
        timesteps = schedule(request.num_steps, encoded.rows * encoded.columns)
        branches: Sequence[Branch] = encoded.branches
        if self.savings.pad_rows:
            branches = keep_one_pad(branches)
        if plan.has_joint_branches and all(branch.txt_ids is None for branch in branches):
            branches = [join(branches)]
        prologues = [self._steps(branch, timesteps[:-1]) for branch in branches]
        ids = self._image_ids(encoded)
        layouts = [self._layout(branch, ids, encoded) for branch in branches]
        latents, reference = start.latents.to(device), encoded.reference.to(device)
        times = timesteps.tolist()
        for index in range(start.step, request.num_steps):
            t, t_next = times[index], times[index + 1]
            velocity = torch.cat(
                [
                    self._velocity(latents, reference, prologue(index), layout)
                    for prologue, layout in zip(prologues, layouts, strict=True)
                ]
            )
            if request.guidance_scale != 1.0:
                cond, uncond = velocity.chunk(2)
                velocity = guide(cond, uncond, request.guidance_scale, t, self.config.guidance_rule)
            predicted = euler_step(latents, velocity, t, 0.0)
            latents = euler_step(latents, velocity, t, t_next)
            yield DenoiseState(latents, index + 1, predicted)

    def _image_ids(self, encoded: Encoded) -> Tensor:
        """The coordinates of the image tokens: those of the reference only where there is one."""
        rows, columns = encoded.rows, encoded.columns
        if encoded.reference.shape[1] == 0:
            return position_ids(rows, columns)
        return image_position_ids(rows, columns, self.config.reference_offset)

    def decode(self, latents: Tensor, encoded: Encoded, plan: Plan = PLANS[0]) -> Pixels:
        """Turn latents, (1, N, C) tokens, into a picture."""
        _check_finite(latents)
        latents = unpack(latents, encoded.rows, encoded.columns)
        z = latents / self.config.latent_scale + self.config.latent_shift
        with self._tiles(plan):
            decoded = self.vae.decode(z.to(self.vae.device, self.vae.dtype))[0]  # (3, H, W)
        return _as_pixels(decoded)

    def _tell(self, run: EditRun, state: DenoiseState, encoded: Encoded) -> Progress:
        """The report of a step that is done, with its preview if there is to be one."""
        preview = None
        is_shown = state.step in run.request.preview_steps
        if is_shown and state.predicted is not None and encoded.sketch is not None:
            latents = unpack(state.predicted, encoded.rows, encoded.columns)
            height, width = (
                side * self.config.size_multiple for side in (encoded.rows, encoded.columns)
            )
            preview = _as_pixels(encoded.sketch(latents, height, width)[0])
        run.steps_told = state.step
        return Progress("denoising", state.step, run.request.num_steps, preview)

    @contextlib.contextmanager
    def _tiles(self, plan: Plan) -> Iterator[None]:
        """The autoencoder in tiles, where the plan says so; afterwards it is as it was."""
        before = self.vae.tile
        if plan.has_vae_tiles:
            self.vae.tile = VAE_TILE
        try:
            yield
        finally:
            self.vae.tile = before

    def _read(self, prompts: Sequence[str], image: Pixels) -> tuple[Branch, ...]:
        """The branches of several prompts about one picture."""
        if len(prompts) > 1 and not self.savings.shared_prefix:
            return tuple(self._read([prompt], image)[0] for prompt in prompts)
        if isinstance(self.conditioner, ConditionerV12):
            return tuple(map(_branch_v1_2, self.conditioner.encode_each(prompts, image)))
        embeds, mask = self.conditioner.encode_many(prompts, image)
        return tuple(map(Branch, torch.split(embeds, 1), torch.split(mask, 1)))

    def _steps(self, branch: Branch, timesteps: Tensor) -> Callable[[int], PrologueStep]:
        """What the core needs to know about a step, by its number."""
        if self.savings.all_timesteps:
            return self._prologue(branch, timesteps).__getitem__
        return lambda index: self._prologue(branch, timesteps[index : index + 1])[0]

    def _prologue(self, branch: Branch, timesteps: Tensor) -> Prologue:
        device, dtype = self._device, self._dtype
        quoted = branch.quoted
        if quoted is not None:
            quoted = QuotedText(quoted.embeds.to(device, dtype), quoted.mask.to(device))
        return self.transformer.prologue(
            branch.embeds.to(device, dtype),
            branch.mask.to(device),
            timesteps.to(device),
            quoted,
        )

    def _layout(self, branch: Branch, img_ids: Tensor, encoded: Encoded) -> Layout:
        """The rows of a branch's text and of the picture's tokens."""
        wanted = encoded.rows * encoded.columns if self.savings.last_block else None
        text_length, pad_copies = branch.embeds.shape[1], branch.pad_copies
        return Layout(self._rope(branch, img_ids, encoded), text_length, pad_copies, wanted)

    def _rope(self, branch: Branch, img_ids: Tensor, encoded: Encoded) -> Tensor:
        """The rotations of the same rows."""
        device, length = self._device, branch.embeds.shape[1] + branch.pad_copies
        if branch.txt_ids is not None:
            return self.transformer.rope(img_ids.to(device), length, branch.txt_ids.to(device))

        def make() -> Tensor:
            return self.transformer.rope(img_ids.to(device), length)

        if self.savings.rope_cache:
            key = (encoded.rows, encoded.columns, len(img_ids), length, device)
            table = self._tables.get(key, make)
        else:
            table = make()
        # All text stands at the origin, so it does not matter which rows of it are left out.
        return table[0, branch.pad_copies :].unsqueeze(0)

    def _encode_latents(self, pixels: Tensor) -> Tensor:
        """Latents (1, C, H, W) of pixels (1, 3, H, W), 0 to 255.

        The mode, not a sample, so that runs repeat.
        """
        scaled = pixels.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        z = self.vae.encode(scaled).float()
        return (z - self.config.latent_shift) * self.config.latent_scale

    def _velocity(
        self, latents: Tensor, reference: Tensor, step: PrologueStep, layout: Layout
    ) -> Tensor:
        """The velocity of the latents in float32, (B, N, C), for one or both prompts."""
        img = torch.cat([latents, reference], dim=1).expand(step.txt.shape[0], -1, -1)
        velocity = self.transformer.core(img.to(self._dtype), step, layout)
        return widen(velocity[:, : latents.shape[1]])  # that of the reference is not used

    def _name(self, branch: Branch) -> str | None:
        """The edit that the prompt asks for, if there is a recogniser."""
        if self.recogniser is None:
            return None
        return self.recogniser.recognise(PromptEncoding(branch.embeds[0], branch.mask[0]))

    @property
    def _device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype


def _branch_v1_2(encoding: PromptEncodingV12) -> Branch:
    """A branch that is as long as its prompt, so all of it is real."""
    embeds = encoding.prompt_embeds.unsqueeze(0)
    return Branch(
        embeds=embeds,
        mask=embeds.new_ones(embeds.shape[:2]),
        quoted=QuotedText(encoding.token_embeds.unsqueeze(0), encoding.text_mask.unsqueeze(0)),
        txt_ids=encoding.position_ids,
    )


def _as_tensor(image: Pixels) -> Tensor:
    """Pixels (H, W, 3) as (1, 3, H, W)."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0)


def _as_pixels(numbers: Tensor) -> Pixels:
    """A picture (3, H, W), about -1 to 1, as pixels (H, W, 3)."""
    _check_finite(numbers)
    pixels = (numbers.float().clamp(-1, 1) + 1) * 127.5
    image: Pixels = pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return image


def _check_finite(numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise FloatingPointError("the edit produced numbers that are not finite")
