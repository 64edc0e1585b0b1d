"""The pipeline: a picture and an instruction go in, progress and the edited picture come out.

An edit is *encode* (reference latents, hidden states of both prompts), *denoise* (`denoising`) and
*decode*. It runs as a generator, so that progress and cancellation need no callback, and keeps what
is done in an `EditRun`, so that it can continue after a failure. Some checkpoints also make a
picture from the prompt alone: the same stages without a reference.

It knows nothing of files, queues or a device's memory; mistakes of a caller are `ValueError`s.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.conditioner import Conditioner, PromptEncoding, Seen
from step1x_edit.model.conditioner_v1_2 import ConditionerV12, PromptEncodingV12
from step1x_edit.model.config import PATCH_SIZE, ModelConfig, ReferenceResize
from step1x_edit.model.connector import masked_mean
from step1x_edit.model.denoising import Branch, Denoiser, DenoiseState, Encoded
from step1x_edit.model.flow import jumps, schedule
from step1x_edit.model.kept import Kept
from step1x_edit.model.latents import draw_noise, pack, unpack
from step1x_edit.model.region import region_of
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.rope import RecentTables
from step1x_edit.model.savings import ALL, Savings
from step1x_edit.model.sizes import fit_size
from step1x_edit.model.sketch import Pairs, Sketch, chart
from step1x_edit.model.steps import Evaluations, Profile, StepPolicy, choose_steps
from step1x_edit.model.team import Team
from step1x_edit.model.transformer import QuotedText, Transformer


@dataclass(frozen=True)
class Step:
    """Step `step` of `total` of a phase; a step of denoising is reported when it is done."""

    phase: Literal["encoding", "denoising", "decoding"]
    step: int
    total: int
    preview: Pixels | None = field(default=None, compare=False, repr=False)
    """The picture as predicted at this step, if a preview was requested."""
    evaluated: int = field(default=0, compare=False)
    """In how many steps of denoising the transformer has run, of `to_evaluate`."""
    to_evaluate: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Edited:
    """The picture at the size it was edited in, and how its prompt was understood."""

    image: Pixels
    label: str | None = None
    cut: tuple[str, ...] = ()
    """Which of prompt and negative prompt the checkpoint did not read to the end."""
    evaluations: Evaluations | None = None


@dataclass
class EditRun:
    """An edit under way; it keeps what is done, so that it can continue after a failure."""

    request: NetworkRequest
    encoded: Encoded | None = None
    label: str | None = None
    """The edit that the prompt asks for: set once it is encoded, if there is a recogniser."""
    state: DenoiseState | None = None
    steps_reported: int = 0


@dataclass(frozen=True)
class Plan:
    """How an edit spends memory."""

    has_joint_branches: bool = True
    """Whether prompt and negative prompt run as one batch rather than one after the other.

    The prompts of v1.2 differ in length and always run one after the other.
    """
    has_vae_tiles: bool = False
    """Whether the autoencoder processes pictures larger than `VAE_TILE` in overlapping tiles.

    Its normalisation then averages over a tile instead of the picture. Up to one tile nothing
    changes; at 1024 the demo's pixels differ by 0.8 of 255 on average.
    """
    keepable: int = 0
    """Bytes that may be kept from step to step: the keys and values of what a mask protects."""
    keeps_prologues: bool = True
    """Whether prologues are kept for later edits.

    Not worth it if all weights are on a device: it computes one as fast as it copies one.
    """


PLANS: Final = (Plan(), Plan(has_joint_branches=False, has_vae_tiles=True))
"""The fastest first, the one that needs the least memory last."""

VAE_TILE: Final = 512
"""Side of a tile in pixels."""

BLACK_SIDE: Final = 1024
"""Side of the black picture that the conditioner sees if there is none, at any size of the result:
as in text to image by `inference.py` of Step1X-Edit."""


class Recogniser(nn.Linear):
    """Names the edit that a prompt asks for, from the mean of its hidden states."""

    def __init__(self, in_features: int, labels: Sequence[str]) -> None:
        super().__init__(in_features, len(labels))
        self.labels = tuple(labels)

    def recognise(self, prompt: PromptEncoding) -> str:
        """The likeliest label for one prompt, (L, C) and (L)."""
        mean = masked_mean(prompt.prompt_embeds[None].float(), prompt.prompt_mask[None])  # (1, C)
        return self.labels[int(self(mean.to(self.weight)).argmax())]


class _Picture:
    """A picture to edit. It is only resized to its working size if something has to look at it."""

    def __init__(self, image: Pixels, size: tuple[int, int]) -> None:
        self.image = image
        self.size = size
        """Width and height to edit it in."""

    @cached_property
    def key(self) -> Hashable:
        """The same for the same pixels at the same working size only."""
        digest = hashlib.sha256(np.ascontiguousarray(self.image).data).digest()
        return digest, self.image.shape, self.size

    @cached_property
    def resized(self) -> Pixels:
        """In its working size, 8 bits per channel."""
        picture = Image.fromarray(self.image).resize(self.size, Image.Resampling.LANCZOS)
        return np.asarray(picture)

    def for_vae(self, resize: ReferenceResize) -> Tensor:
        """The same for the autoencoder, (1, 3, H, W), 0 to 255."""
        match resize:
            case ReferenceResize.LANCZOS:
                return _as_tensor(self.resized)
            case ReferenceResize.BILINEAR:
                whole, size = _as_tensor(self.image).float(), self.size[::-1]
                return F.interpolate(whole, size, mode="bilinear", antialias=True)


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
        profile: Profile | None = None,
    ) -> None:
        """Without a profile every edit is exact."""
        self.transformer = transformer
        self.vae = vae
        self.conditioner = conditioner
        self.config = config
        self.recogniser = recogniser
        self.savings = savings
        self.profile = profile
        self.coded: Transformer | None = None
        """The transformer with layers in 8-bit codes, for the modes that are not exact."""
        self.team_for: Callable[[Encoded, DenoiseState, NetworkRequest, Plan], Team] = alone
        """Who makes the steps of an edit."""
        self._tables = RecentTables()
        self._chart: Pairs | None = None
        self.keep(0)

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
        """Free what stays on the device between edits: rotary tables and layers in codes."""
        self._tables.clear()
        self.coded = None

    def keep(self, most: int) -> None:
        """Keep at most this many bytes of host memory for edits that do the same again.

        A half is for encoded pictures and prompts, the other for prologues: one of those is as
        large as the encodings of many pictures.
        """
        self._encodings, self._prologues = Kept(most // 2), Kept(most // 2)

    def forget(self) -> bool:
        """Forget what was kept of earlier edits; returns whether there was anything."""
        return any([self._encodings.clear(), self._prologues.clear()])

    def forget_prologues(self) -> None:
        """Forget what depends on the transformer's weights."""
        self._prologues.clear()
        self.coded = None

    def edit(self, request: NetworkRequest) -> Generator[Step | Edited, None, None]:
        """Yield progress and, last, the edited picture; closing the generator stops the work.

        Raises ValueError for a picture that is too narrow or that this checkpoint cannot make, or
        a mode that it cannot make it in, and FloatingPointError if numbers overflow.
        """
        return self.advance(EditRun(request), PLANS[0])

    @torch.inference_mode()
    def advance(self, run: EditRun, plan: Plan) -> Generator[Step | Edited, None, None]:
        """Do what remains of a run, as `edit` does; the run keeps each step that is done.

        After a failure, such as memory running out, the same run can be advanced under another
        plan: neither the encoding nor a step is repeated.
        """
        request = run.request
        if request.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {request.num_steps}")
        evaluated = self._policy(request, self._num_tokens(request)).evaluated
        if run.encoded is None:
            yield Step("encoding", 0, 1)
            run.encoded = self.encode(request, plan)
        run.label = self._name(run.encoded.branches[0])
        if run.state is None:
            run.state = self.start(run.encoded, request.seed, request.draw)
        if run.state.step > run.steps_reported:  # the preview of that step failed
            yield self._report(run, run.state, run.encoded, evaluated)
        # Closed at once if a preview fails, so that no other process waits for this one.
        with contextlib.closing(self.denoise(run.encoded, run.state, request, plan)) as states:
            for state in states:
                run.state = state
                yield self._report(run, state, run.encoded, evaluated)
        yield Step("decoding", 0, 1)
        image = self.decode(run.state.latents, run.encoded, plan)
        done = run.state.evaluations
        skipped = request.num_steps * len(run.encoded.branches) - done
        yield Edited(image, run.label, run.encoded.cut, Evaluations(done, skipped))

    def _report(
        self, run: EditRun, state: DenoiseState, encoded: Encoded, evaluated: Sequence[int]
    ) -> Step:
        """The progress after a step, with its preview if one is wanted."""
        preview = None
        is_shown = state.step in run.request.preview_steps
        if is_shown and state.predicted is not None and encoded.sketch is not None:
            latents = unpack(state.predicted, encoded.rows, encoded.columns)
            height, width = (
                side * self.config.size_multiple for side in (encoded.rows, encoded.columns)
            )
            preview = _as_pixels(encoded.sketch(latents, height, width)[0])
        run.steps_reported = state.step
        return Step(
            "denoising",
            state.step,
            run.request.num_steps,
            preview,
            evaluated=sum(index < state.step for index in evaluated),
            to_evaluate=len(evaluated),
        )

    def check_mode(self, request: NetworkRequest) -> None:
        """Raise ValueError if this checkpoint does not make such an edit in the mode asked for."""
        self._policy(request, self._num_tokens(request))

    def _num_tokens(self, request: NetworkRequest) -> int:
        """Of the latents."""
        columns, rows = (side // self.config.size_multiple for side in self._size(request))
        return rows * columns

    def _policy(
        self, request: NetworkRequest, tokens: int, has_regions: bool = False
    ) -> StepPolicy:
        """What each step does."""
        times = schedule(request.num_steps, tokens).tolist()
        jumps_at = jumps(times[:-1], request.guidance_scale, self.config.guidance_rule)
        policy = choose_steps(request.mode, times, tokens, self.profile, jumps_at)
        return policy.with_regions() if has_regions else policy

    # --- encode -----------------------------------------------------------------------------------

    def encode(self, request: NetworkRequest, plan: Plan = PLANS[0]) -> Encoded:
        """Encode the picture as latents and, with the prompts, as hidden states."""
        if request.image is None:
            return self._encode_words(request)
        size, multiple = self._size(request), self.config.size_multiple
        picture = _Picture(request.image, size)
        pixels = partial(picture.for_vae, self.config.reference_resize)
        with self._tiles(plan):
            key = (picture.key, self.vae.tile)
            latents = self._encodings.get(("latents", key), lambda: self._encode_latents(pixels()))
        return Encoded(
            reference=pack(latents),
            branches=self._read(self._prompts(request), picture),
            rows=size[1] // multiple,
            columns=size[0] // multiple,
            cut=self._cut(request, picture),
            sketch=self._sketch(request, key, lambda: [Pairs.of(latents, pixels())]),
        )

    @torch.inference_mode()
    def encode_target(self, image: Pixels, encoded: Encoded) -> Tensor:
        """The latents (1, N, C) of another picture in the size of an encoded one, for training."""
        multiple = self.config.size_multiple
        picture = _Picture(image, (encoded.columns * multiple, encoded.rows * multiple))
        return pack(self._encode_latents(picture.for_vae(self.config.reference_resize)))

    def _encode_words(self, request: NetworkRequest) -> Encoded:
        """Encode the prompts alone, about a black picture; there are no reference tokens."""
        multiple, sides = self.config.size_multiple, (request.width, request.height)
        if not self.config.can_generate:
            raise ValueError(f"{self.config.version} makes no pictures from words alone")
        if min(sides) < multiple or any(side % multiple for side in sides):
            raise ValueError(f"width and height must be multiples of {multiple}, not {sides}")
        black = _Picture(np.zeros((BLACK_SIDE, BLACK_SIDE, 3), np.uint8), (BLACK_SIDE, BLACK_SIDE))
        return Encoded(
            reference=torch.empty(1, 0, self.transformer.config.in_channels),
            branches=self._read(self._prompts(request), black),
            rows=request.height // multiple,
            columns=request.width // multiple,
            cut=self._cut(request, black),
            sketch=self._sketch(request, "chart", list),
        )

    def _size(self, request: NetworkRequest) -> tuple[int, int]:
        """The width and height of the edited picture."""
        if request.image is None:
            return request.width, request.height
        height, width = request.image.shape[:2]
        return fit_size(width, height, request.size_level, self.config.size_multiple)

    def _encode_latents(self, pixels: Tensor) -> Tensor:
        """Latents (1, C, H, W) of pixels (1, 3, H, W), 0 to 255.

        z is the posterior's mean: the reference samples it, which would make runs differ.
        """
        wide = torch.promote_types(self.vae.dtype, torch.float32)
        scaled = pixels.to(self.vae.device, wide) / 127.5 - 1
        z = self.vae.encode(scaled.to(self.vae.dtype)).float()
        return (z - self.config.latent_shift) * self.config.latent_scale

    def _prompts(self, request: NetworkRequest) -> list[str]:
        """The prompt and, with guidance, the negative prompt."""
        if request.guidance_scale == 1.0:
            return [request.prompt]
        negative = request.negative_prompt
        if negative is None and request.image is None:
            negative = self.config.generation_negative_prompt
        return [request.prompt, negative or ""]

    def _read(self, prompts: Sequence[str], picture: _Picture) -> tuple[Branch, ...]:
        """Read several prompts about one picture: together, unless the conditioner is v1.2's."""
        is_apart = isinstance(self.conditioner, ConditionerV12) or not self.savings.shared_prefix
        groups = [(prompt,) for prompt in prompts] if is_apart else [tuple(prompts)]

        @cache
        def seen() -> Seen:
            conditioner = self.conditioner
            look = partial(conditioner.see, picture.resized, conditioner.config)
            return self._encodings.get(("seen", picture.key), look)

        def read(group: tuple[str, ...]) -> tuple[Branch, ...]:
            key = ("read", picture.key, group)
            return self._encodings.get(key, lambda: self._read_group(group, seen(), key))

        return tuple(itertools.chain.from_iterable(map(read, groups)))

    def _read_group(
        self, prompts: Sequence[str], seen: Seen, origin: Hashable
    ) -> tuple[Branch, ...]:
        """Read prompts in one pass."""
        if isinstance(self.conditioner, ConditionerV12):
            found = [_branch_v1_2(self.conditioner.encode(prompt, seen)) for prompt in prompts]
        else:
            embeds, mask = self.conditioner.encode_many(prompts, seen)
            found = list(map(Branch, torch.split(embeds, 1), torch.split(mask, 1)))
        return tuple(replace(each, origin=(origin, index)) for index, each in enumerate(found))

    def _cut(self, request: NetworkRequest, picture: _Picture) -> tuple[str, ...]:
        """Which of the prompts are not read to the end."""
        prompts = zip(("prompt", "negative prompt"), self._prompts(request), strict=False)
        return tuple(
            name for name, prompt in prompts if self.conditioner.cuts(prompt, picture.size)
        )

    def _sketch(
        self, request: NetworkRequest, key: Hashable, pairs: Callable[[], list[Pairs]]
    ) -> Sketch | None:
        """Fit the layer for previews, if any are wanted, to pairs of latents and pixels."""
        if not request.preview_steps:
            return None
        if self._chart is None:
            self._chart = Pairs.of(self._encode_latents(chart()), chart())
        usual = self._chart
        return self._encodings.get(("sketch", key), lambda: sum(pairs(), usual).fit())

    # --- denoise ----------------------------------------------------------------------------------

    def start(self, encoded: Encoded, seed: int, draw: int = 0) -> DenoiseState:
        """The state before the first step: the seed's noise; `draw` as in `draw_noise`."""
        rows, columns = encoded.rows * PATCH_SIZE, encoded.columns * PATCH_SIZE
        noise = draw_noise((1, self.config.latent_channels, rows, columns), seed, draw)
        return DenoiseState(pack(noise), step=0)

    def denoise(
        self, encoded: Encoded, start: DenoiseState, request: NetworkRequest, plan: Plan = PLANS[0]
    ) -> Generator[DenoiseState, None, None]:
        """Run the steps that remain, and yield after each."""
        prologues = self._prologues if plan.keeps_prologues else Kept()
        transformer = self.transformer
        if request.mode != "exact" and self.coded is not None:
            transformer = self.coded
        region = self._region(request, encoded, plan)
        policy = self._policy(request, encoded.rows * encoded.columns, region is not None)
        is_joint = plan.has_joint_branches
        team = self.team_for(encoded, start, request, plan)
        with team.together():  # directly: from here on, the others wait for this process
            savings, tables = self.savings, self._tables
            denoiser = Denoiser(transformer, self.config, savings, tables, prologues, team)
            yield from denoiser.denoise(encoded, start, request, policy, is_joint, region)

    def _region(self, request: NetworkRequest, encoded: Encoded, plan: Plan) -> Tensor | None:
        """The tokens that a mask lets change, if some steps may run these alone.

        That needs a checkpoint that gains by it, and room for the keys and values of the others.
        """
        if request.mode != "turbo" or request.mask is None:
            return None
        if self.profile is None or not self.profile.has_regions:
            return None
        image = encoded.rows * encoded.columns + encoded.reference.shape[1]
        rows = sum(branch.mask.shape[1] + image for branch in encoded.branches)
        if self.transformer.size_kept(rows) > plan.keepable:
            return None
        return region_of(request.mask, encoded.rows, encoded.columns)

    # --- decode -----------------------------------------------------------------------------------

    def decode(self, latents: Tensor, encoded: Encoded, plan: Plan = PLANS[0]) -> Pixels:
        """Turn latents, (1, N, C) tokens, into a picture."""
        _check_finite(latents)
        latents = unpack(latents, encoded.rows, encoded.columns)
        z = latents / self.config.latent_scale + self.config.latent_shift
        with self._tiles(plan):
            decoded = self.vae.decode(z.to(self.vae.device, self.vae.dtype))[0]  # (3, H, W)
        return _as_pixels(decoded)

    @contextlib.contextmanager
    def _tiles(self, plan: Plan) -> Iterator[None]:
        """Let the autoencoder work in tiles if the plan says so; afterwards it is as before."""
        before = self.vae.tile
        if plan.has_vae_tiles:
            self.vae.tile = VAE_TILE
        try:
            yield
        finally:
            self.vae.tile = before

    # --- the recogniser ---------------------------------------------------------------------------

    @torch.inference_mode()
    def recognise(self, prompt: str, image: Pixels) -> str | None:
        """Name the edit that the prompt asks for; None if the checkpoint has no recogniser."""
        if self.recogniser is None:
            return None
        (branch,) = self._read([prompt], _Picture(image, (image.shape[1], image.shape[0])))
        return self._name(branch)

    def _name(self, branch: Branch) -> str | None:
        """The edit that the prompt asks for, if there is a recogniser."""
        if self.recogniser is None:
            return None
        return self.recogniser.recognise(PromptEncoding(branch.embeds[0], branch.mask[0]))


def alone(*_: object) -> Team:
    """The team of one process."""
    return Team()


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
