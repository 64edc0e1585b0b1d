"""The denoising loop: from noise to latents, step by step, under one or two prompts.

Before the first step it prepares what depends on the prompts only (the *prologue* and the layout of
the rows); then each step runs the transformer's *core* or, if the policy says so, extrapolates what
it would predict, of all tokens or of those outside a region; guidance and an Euler step follow, and
it yields. It knows nothing of pictures, previews or what an edit does after a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from step1x_edit.model.blocks import KeysAndValues, Layout, widen
from step1x_edit.model.config import ModelConfig
from step1x_edit.model.flow import euler_step, extrapolate, guide, schedule
from step1x_edit.model.kept import Kept, moved
from step1x_edit.model.latents import image_position_ids, position_ids
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.rope import RecentTables
from step1x_edit.model.savings import Savings
from step1x_edit.model.sketch import Sketch
from step1x_edit.model.steps import Action, StepPolicy
from step1x_edit.model.team import Cut, Team
from step1x_edit.model.transformer import Prologue, PrologueStep, QuotedText, Transformer


@dataclass(frozen=True)
class Branch:
    """A prompt as the transformer takes it, or several in one batch (`join`)."""

    embeds: Tensor  # (B, L, C), the conditioner's states
    mask: Tensor  # (B, L) of 0 and 1
    quoted: QuotedText | None = None
    txt_ids: Tensor | None = None  # (L, 3); None: all tokens are at the origin
    pad_copies: int = 0
    """As in `Layout`."""
    origin: Hashable = field(default_factory=object)
    """Equal for branches that were made of the same picture and prompts."""


@dataclass(frozen=True)
class Encoded:
    """A picture and its prompts, encoded."""

    reference: Tensor  # (1, N, C) tokens; (1, 0, C) if there is no picture
    branches: tuple[Branch, ...]
    """That of the prompt and, with guidance, that of the negative prompt."""
    rows: int
    columns: int
    cut: tuple[str, ...] = ()
    """Which of prompt and negative prompt the checkpoint did not read to the end."""
    sketch: Sketch | None = None
    """How previews are made, if any are wanted."""


@dataclass(frozen=True)
class DenoiseState:
    """Everything that the loop carries from step to step; it can continue from any state."""

    latents: Tensor  # (1, N, C) tokens, float32
    step: int  # steps done
    predicted: Tensor | None = None  # (1, N, C), the clean latents by the last step's velocity
    known: tuple[tuple[float, Tensor], ...] = ()  # the last two (t, velocity (1, N, C))
    evaluations: int = 0
    """How often the transformer has run, once for each prompt of a step."""


@dataclass(frozen=True)
class Denoiser:
    """The loop with the transformer of one checkpoint."""

    transformer: Transformer
    config: ModelConfig
    savings: Savings
    tables: RecentTables
    prologues: Kept
    team: Team = field(default_factory=Team)

    def denoise(
        self,
        encoded: Encoded,
        start: DenoiseState,
        request: NetworkRequest,
        policy: StepPolicy,
        has_joint_branches: bool,
        region: Tensor | None = None,
    ) -> Generator[DenoiseState, None, None]:
        """Run the steps that remain, and yield after each.

        `has_joint_branches` runs both prompts as one batch, if they have one length and no ids.
        `region` are the tokens (K,) of the latents that region steps run.
        """
        if start.step == request.num_steps:
            return
        timesteps = schedule(request.num_steps, encoded.rows * encoded.columns)  # (T+1)
        branches = self._branches(encoded, has_joint_branches)
        prologues = [self._steps(branch, timesteps, policy.evaluated) for branch in branches]
        ids = self._image_ids(encoded)
        wholes = [self._layout(branch, ids, encoded) for branch in branches]
        latents, reference = start.latents.to(self._device), encoded.reference.to(self._device)
        known = tuple((t, velocity.to(self._device)) for t, velocity in start.known)
        region = None if region is None else region.to(self._device)
        evaluations, times = start.evaluations, timesteps.tolist()
        layouts = [self._mine(each, latents.shape[1], reference.shape[1]) for each in wholes]
        kept: Sequence[Sequence[KeysAndValues] | None] = [None] * len(layouts)
        parts = []
        if region is not None:
            parts = [self._mine(each.only(region), len(region), 0) for each in wholes]
        for index in range(start.step, request.num_steps):
            t, t_next = times[index], times[index + 1]
            action = policy.actions[index]
            if action is Action.REUSE:
                velocity = extrapolate(known, t)
            else:
                self.team.go_on()
                # After a failure nothing is kept.
                inside = region if action is Action.REGION and kept[0] is not None else None
                steps = [prologue(index) for prologue in prologues]
                if inside is not None:
                    some, none = latents[:, inside], reference[:, :0]
                    velocity = self._velocities(some, none, steps, parts, kept)  # (1 or 2, K, C)
                else:
                    if region is not None:
                        kept = [self.transformer.keys_and_values() for _ in layouts]
                    velocity = self._velocities(latents, reference, steps, layouts, kept)
                evaluations += len(velocity)
                if request.guidance_scale != 1.0:
                    cond, uncond = velocity.chunk(2)
                    rule = self.config.guidance_rule
                    velocity = guide(cond, uncond, request.guidance_scale, t, rule)
                if inside is not None:
                    velocity = extrapolate(known, t).index_copy(1, inside, velocity)
                if index in policy.jumps:
                    known = ()  # a line through what was before leads elsewhere
                known = (*known[-1:], (t, velocity))
            predicted = euler_step(latents, velocity, t, 0.0)
            latents = euler_step(latents, velocity, t, t_next)
            yield DenoiseState(latents, index + 1, predicted, known, evaluations)

    def _velocities(
        self,
        latents: Tensor,
        reference: Tensor,
        steps: Sequence[PrologueStep],
        layouts: Sequence[Layout],
        kept: Sequence[Sequence[KeysAndValues] | None],
    ) -> Tensor:
        """The velocity of the latents in float32, (1 or 2, N, C), for each prompt."""

        def mine() -> Tensor:
            mine = self.team.rows(latents)
            img = torch.cat([mine, self.team.rows(reference)], dim=1)
            found = []
            for step, layout, its in zip(steps, layouts, kept, strict=True):
                batch = img.expand(step.txt.shape[0], -1, -1).to(self._dtype)
                step = replace(step, txt=self.team.rows(step.txt))
                velocity = self.transformer.core(batch, step, layout, its)
                found.append(widen(velocity[:, : mine.shape[1]]))  # the reference's is not used
            return torch.cat(found)

        return self.team.join(mine, latents.shape[1])

    # --- what depends on the prompts only ---------------------------------------------------------

    def _branches(self, encoded: Encoded, has_joint_branches: bool) -> Sequence[Branch]:
        """The prompts without the padding that can be spared, as one batch if possible."""
        branches: Sequence[Branch] = encoded.branches
        if self.savings.pad_rows:
            branches = keep_one_pad(branches)
        branches = self.team.branches(branches)
        if has_joint_branches and all(branch.txt_ids is None for branch in branches):
            branches = [join(branches)]
        return branches

    def _steps(
        self, branch: Branch, timesteps: Tensor, evaluated: Sequence[int]
    ) -> Callable[[int], PrologueStep]:
        """What the core needs to know about an evaluated step, by its number."""
        if self.savings.all_timesteps:
            prologue = self._prologue(branch, timesteps[list(evaluated)])
            return lambda index: prologue[evaluated.index(index)]
        return lambda index: self._prologue(branch, timesteps[index : index + 1])[0]

    def _prologue(self, branch: Branch, timesteps: Tensor) -> Prologue:
        device, dtype = self._device, self._dtype

        def make() -> Prologue:
            quoted = branch.quoted
            if quoted is not None:
                quoted = QuotedText(quoted.embeds.to(device, dtype), quoted.mask.to(device))
            embeds, mask = branch.embeds.to(device, dtype), branch.mask.to(device)
            return self.transformer.prologue(embeds, mask, timesteps.to(device), quoted)

        key = (branch.origin, tuple(timesteps.tolist()))
        return moved(self.prologues.get(key, make), device)

    def _image_ids(self, encoded: Encoded) -> Tensor:
        """The coordinates of the image tokens: of the latents and of the reference, if any."""
        rows, columns = encoded.rows, encoded.columns
        if encoded.reference.shape[1] == 0:
            return position_ids(rows, columns)
        return image_position_ids(rows, columns, self.config.reference_offset)

    def _layout(self, branch: Branch, img_ids: Tensor, encoded: Encoded) -> Layout:
        """The rows of a branch's text and of the image."""
        wanted = encoded.rows * encoded.columns if self.savings.last_block else None
        text_length, pad_copies = branch.embeds.shape[1], branch.pad_copies
        return Layout(self._rope(branch, img_ids, encoded), text_length, pad_copies, wanted)

    def _mine(self, whole: Layout, num_latents: int, num_reference: int) -> Layout:
        """The rows of a layout that this process has."""
        if self.team.num_parts == 1:
            return whole
        streams = [whole.text_length, num_latents, num_reference]
        ropes = [self.team.rows(each, -3) for each in torch.split(whole.rope, streams, -3)]
        wanted = None if whole.num_wanted is None else ropes[1].shape[-3]
        cut = Cut(self.team, streams, self._device)
        return whole._replace(rope=torch.cat(ropes, dim=-3), num_wanted=wanted, cut=cut)

    def _rope(self, branch: Branch, img_ids: Tensor, encoded: Encoded) -> Tensor:
        """The rotations of the same rows."""
        length = branch.embeds.shape[1] + branch.pad_copies
        img_ids = img_ids.to(self._device)
        if branch.txt_ids is not None:
            return self.transformer.rope(img_ids, length, branch.txt_ids.to(self._device))

        def make() -> Tensor:
            return self.transformer.rope(img_ids, length)

        if self.savings.rope_cache:
            key = (encoded.rows, encoded.columns, len(img_ids), length, self._device)
            table = self.tables.get(key, make)
        else:
            table = make()
        # All text is at the origin, so it does not matter which rows of it are left out.
        return table[0, branch.pad_copies :].unsqueeze(0)

    @property
    def _device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype


def join(branches: Sequence[Branch]) -> Branch:
    """Branches of one length, without ids, as one batch."""
    return Branch(
        torch.cat([branch.embeds for branch in branches]),
        torch.cat([branch.mask for branch in branches]),
        pad_copies=branches[0].pad_copies,
        origin=tuple(branch.origin for branch in branches),
    )


def keep_one_pad(branches: Sequence[Branch]) -> Sequence[Branch]:
    """Cut prompts behind the first row that is padding in all of them; it stands for the rest.

    They keep one length. A prompt that fills its rows, as each of v1.2 does, leaves nothing to cut
    in any.
    """
    # Counted, not summed: the masks of a bfloat16 network cannot tell 353 from 352.
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
