"""Compare the network with recorded numbers of the reference implementation.

    python scripts/check_parity.py DIR [--case NAME]

DIR contains golden cases, each with a JSON sidecar that states its kind, sizes, files and tensors.
Every case is run and reported in one line: name, largest absolute difference, tolerance, verdict.
The exit status is 1 if any case fails or has an unknown kind.

A case also fails if an expected tensor is missing, has another shape, contains a NaN, or is
declared in the sidecar but never compared. Weights in the diffusers layout may be replaced by
`weights_diffusers_sha256` in the sidecar: then the converted tensors are compared by hash.

If a line of a table, or a scenario, has an unknown field, its case fails with the field's name.
Token ids are compared with those of the real tokenizer, for any text (`published_tokenizer`, of the
dev extra). Not checked: of `v1_2_rules`, the words in the traces of caps, which nothing uses.
traces of caps, as nothing is done with them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from published_tokenizer import published_tokenizer
from step1x_edit.checkpoints import keymap
from step1x_edit.checkpoints.lora import delta_of
from step1x_edit.checkpoints.lora_file import read_lora
from step1x_edit.checkpoints.lora_methods import LowRank
from step1x_edit.model import (
    conditioner,
    conditioner_v1_2,
    flow,
    language_model,
    latents,
    reasoning,
    sizes,
)
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.blocks import Layout, timestep_embedding
from step1x_edit.model.config import (
    V1_0,
    V1_1,
    V1_2,
    AutoencoderConfig,
    ConnectorConfig,
    GuidanceRule,
    ModelConfig,
    TransformerConfig,
)
from step1x_edit.model.connector import Connector, masked_mean
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.rope import apply_rope, rope_table
from step1x_edit.model.transformer import QuotedText, Transformer

EXACT = 0.0
FLOAT64_ROUNDING = 1e-12
ONE_ROUNDING = 1e-5  # elementwise float32: machines sum or fuse in different orders
NETWORK = 5e-5
LOOP = 1e-3

PRESETS = {preset.version: preset for preset in (V1_0, V1_1, V1_2)}


Row = Mapping[str, Any]


class Fields(Row):
    """A line of a table that records which of its fields were read."""

    def __init__(self, values: Row) -> None:
        self._values = values
        self.unread = set(values)

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self.unread.discard(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class Case:
    """A golden case and its results so far."""

    path: Path
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By the name of the compared value: difference and tolerance."""
    read: list[Fields] = field(default_factory=list)
    """The lines of tables."""

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """The case in words: kind, sizes, files, tensors."""
        sidecar: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return sidecar

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs and expected outputs; those of a LoRA are outputs only."""
        if "files" not in self.sidecar:
            return load_file(self.beside(".safetensors"))
        return self.load("io" if "io" in self.sidecar["files"] else "expected")

    @property
    def rows(self) -> list[Fields]:
        """The lines of the only table."""
        return self.table("rows")

    def table(self, name: str) -> list[Fields]:
        """The lines of a table. Raises ValueError if there are none."""
        rows = [Fields(row) for row in self.sidecar[name]]
        if not rows:
            raise ValueError(f"the table {name} is empty")
        self.read += rows
        return rows

    @property
    def atol(self) -> float:
        """The tolerance that the makers of the case recommend."""
        return float(self.sidecar.get("check", {}).get("suggested_atol", math.inf))

    def beside(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)

    def load(self, role: str) -> dict[str, Tensor]:
        """Read one of the case's files, in float32 if it is stored in a smaller type."""
        tensors = load_file(self.path.parent / self.sidecar["files"][role])
        return {
            name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in tensors.items()
        }

    def other(self, name: str) -> Case:
        """Return another case of the same directory, whose weights this one uses."""
        return Case(self.path.parent / f"{name}.json")

    def expect(self, name: str, actual: Tensor, tolerance: float) -> None:
        """Compare with an expected tensor of the case."""
        self.compare(name, actual, self.tensors[name], tolerance)

    def compare(self, name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Record the largest absolute difference; nan for different shapes."""
        difference = math.nan
        if actual.shape == expected.shape:
            difference = (actual.double() - expected.double()).abs().max().item()
        self.note(name, difference, tolerance)

    def same(self, name: str, actual: object, expected: object) -> None:
        """Record whether two plain values are equal."""
        self.note(name, 0.0 if actual == expected else math.inf, EXACT)

    def note(self, name: str, difference: float, tolerance: float) -> None:
        """Keep the worst difference under a name."""
        before = self.differences.get(name, (0.0, tolerance))[0]
        # max() would lose a nan on the right
        worst = difference if math.isnan(difference) else max(before, difference)
        self.differences[name] = (worst, tolerance)

    def failures(self) -> list[str]:
        """List the failures; empty if the case passes."""
        wrong = [
            f"{name} differs by {difference:.3g}"
            for name, (difference, tolerance) in self.differences.items()
            if not difference <= tolerance  # a nan is not
        ]
        ignored = [name for name in self.outputs() if name not in self.differences]
        ignored += sorted({name for row in self.read for name in row.unread})
        return wrong + [f"{name} was not compared" for name in ignored]

    def outputs(self) -> list[str]:
        """Names of the expected tensors, from the sidecar and from the file."""
        if "files" not in self.sidecar:
            return []
        return [name for name in {**self.tensors, **self.sidecar["tensors"]} if name[:4] == "out."]


Check = Callable[[Case], None]


# ----------------------------------------------------------------------------- tables and rules


def check_pack(case: Case) -> None:
    rows, cols = (side // 2 for side in case.sidecar["latent_hw"])
    latent, packed = case.tensors["latent"], case.tensors["packed"]
    case.expect("packed", latents.pack(latent), EXACT)
    case.expect("latent", latents.unpack(packed, rows, cols), EXACT)


def check_rope(case: Case) -> None:
    sidecar = case.sidecar
    versions = [name.removesuffix(".ids") for name in case.sidecar["tensors"] if ".ids" in name]
    for version in versions:
        offset = PRESETS[version].reference_offset
        text = torch.zeros(sidecar["text_tokens"], 3)
        rows, cols = sidecar["grid_hw"]
        ids = torch.cat([text, latents.image_position_ids(rows, cols, offset)])
        table = rope_table(ids, sidecar["axes_dim"], sidecar["theta"])
        case.expect(f"{version}.ids", ids, EXACT)
        case.expect(f"{version}.cos", table[..., 0], EXACT)
        case.expect(f"{version}.sin", table[..., 1], EXACT)
        for name in ("q", "k"):
            if f"{version}.{name}_rot" not in case.sidecar["tensors"]:
                continue
            rotated = apply_rope(case.tensors[name].transpose(1, 2), table).transpose(1, 2)
            case.expect(f"{version}.{name}_rot", rotated, ONE_ROUNDING)


def check_schedule(case: Case) -> None:
    for row in case.rows:
        num_steps, num_tokens = row["num_steps"], row["image_seq_len"]
        timesteps = flow.schedule(num_steps, num_tokens)
        case.note("mu", abs(flow.mu(num_tokens) - row["mu"]), FLOAT64_ROUNDING)
        case.compare("timesteps", timesteps, torch.tensor(row["timesteps"]), EXACT)
        fork_timesteps = torch.tensor(row["fork_timesteps"]) / 1000
        case.compare("fork_timesteps", timesteps[:-1], fork_timesteps, min(case.atol, 1e-6))
        for name, rule in (("official", GuidanceRule.OFFICIAL), ("fork", GuidanceRule.ALWAYS)):
            damped = sum(bool(flow.is_damped(t, rule)) for t in timesteps[:-1].tolist())
            case.same(f"power_rule_steps_{name}", damped, row[f"power_rule_steps_{name}"])


def check_cfg_combine(case: Case) -> None:
    cond, uncond = case.tensors["cond"], case.tensors["uncond"]
    scale = case.sidecar["cfg_guidance"]
    _same_damping_constants(case, case.sidecar["threshold"])
    direction = cond - uncond
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    case.expect("diff_norm", norm, ONE_ROUNDING)
    case.expect("norm_divisor", flow.norm_divisor(direction), ONE_ROUNDING)
    for column, rule in (
        ("official_rule", GuidanceRule.OFFICIAL),
        ("fork_rule", GuidanceRule.ALWAYS),
    ):
        for t, outcome in case.sidecar[column].items():
            velocity = flow.guide(cond, uncond, scale, float(t), rule)
            expected = case.tensors[f"expected_{outcome}"]
            case.compare(f"{column} at {t}", velocity, expected, ONE_ROUNDING)
    case.expect(
        "expected_plain", flow.guide(cond, uncond, scale, 1.0, GuidanceRule.NEVER), ONE_ROUNDING
    )
    case.expect(
        "expected_power", flow.guide(cond, uncond, scale, 0.0, GuidanceRule.ALWAYS), ONE_ROUNDING
    )


def check_sizing(case: Case) -> None:
    for row in case.rows:
        width, height = row["input_wh"]
        size = sizes.fit_size(width, height, row["size_level"], V1_1.size_multiple)
        rows, cols = size[1] // V1_1.vae_scale, size[0] // V1_1.vae_scale
        case.same("resized_wh", list(size), row["resized_wh"])
        case.same("latent_hw", [rows, cols], row["latent_hw"])
        case.same("target_tokens", rows * cols // 4, row["target_tokens"])
        case.same("output_wh", [width, height], row["output_wh"])

        v1, v1_2 = V1_1.conditioner, V1_2.conditioner
        rounded = conditioner.round_to_factor(*size)
        seen = conditioner.vlm_image_size(*rounded, v1.min_pixels, v1.max_pixels)
        grid = [seen[1] // 14, seen[0] // 14]
        case.same("v1_vlm_fetch_wh", list(rounded), row["v1_vlm_fetch_wh"])
        case.same("v1_vlm_processor_wh", list(seen), row["v1_vlm_processor_wh"])
        case.same("v1_image_grid_hw", grid, row["v1_image_grid_hw"])
        case.same("v1_image_tokens", grid[0] * grid[1] // 4, row["v1_image_tokens"])
        if "v1_2_vlm_processor_wh" in row:
            seen = conditioner.vlm_image_size(*size, v1_2.min_pixels, v1_2.max_pixels)
            case.same("v1_2_vlm_processor_wh", list(seen), row["v1_2_vlm_processor_wh"])
            tokens = seen[0] * seen[1] // 28**2
            case.same("v1_2_image_tokens", tokens, row["v1_2_image_tokens"])
        if "v1_2_thinker_thumb_wh" in row:
            _check_thinker_size(case, row)


def _check_thinker_size(case: Case, row: Mapping[str, Any]) -> None:
    """Compare the size in which the language model of v1.2 gets the input picture."""
    thumb = language_model.shrink(Image.new("1", tuple(row["input_wh"]))).size
    rounded = conditioner.round_to_factor(*thumb)
    seen = conditioner.vlm_image_size(
        *rounded, language_model.MIN_PIXELS, language_model.MAX_PIXELS
    )
    case.same("v1_2_thinker_thumb_wh", list(thumb), row["v1_2_thinker_thumb_wh"])
    case.same("v1_2_thinker_fetch_wh", list(rounded), row["v1_2_thinker_fetch_wh"])
    case.same("v1_2_thinker_processor_wh", list(seen), row["v1_2_thinker_processor_wh"])
    tokens = seen[0] * seen[1] // conditioner.FACTOR**2
    case.same("v1_2_thinker_image_tokens", tokens, row["v1_2_thinker_image_tokens"])


def check_split_string_v1(case: Case) -> None:
    config = V1_1.conditioner
    sidecar = case.sidecar
    case.same("drop_tokens", config.prefix_length, sidecar["drop_tokens"])
    case.same("max_length", config.text_length, sidecar["max_length"])
    case.same("prefix_chars", len(config.prompt_prefix), sidecar["prefix_chars"])
    head_chars = len(conditioner.render_head(config)) - len(config.prompt_prefix)
    case.same("template_head_chars", head_chars, sidecar["template_head_chars"])
    reader = conditioner.Conditioner(_unread_model(), published_tokenizer(), config)
    for row in case.rows:
        text = conditioner.render_chat(row["prompt"], config)
        first, *pieces = conditioner.split_quotes(text, config.quote_start, config.quote_characters)
        tail = first.partition(conditioner.VISION_END)[2]
        case.same("first_piece_tail", tail, row["first_piece_tail"])
        case.same("pieces", pieces, row["pieces"])
        spelled = [
            conditioner.strip_wrapping_quotes(reader.ids(piece), reader.wrapping_quotes)
            for piece in pieces
        ]
        case.same("piece_token_ids", spelled, row["piece_token_ids"])
        _check_ids(case, row, reader)


def _check_ids(case: Case, row: Row, reader: conditioner.Conditioner) -> None:
    """Compare the recorded ids of a whole chat text with those of our tokenizer and rules."""
    config = reader.config
    image_tokens = math.prod(row["image_grid_hw"]) // 4
    case.same("image_tokens", image_tokens, row["image_tokens"])
    plain = reader.ids(conditioner.render_chat(row["prompt"], config))
    behind = plain.index(reader.vision_end_id) + 1
    case.same(
        "ids_after_vision_end_without_rule",
        plain[behind:],
        row["ids_after_vision_end_without_rule"],
    )
    whole = reader.tokenize(row["prompt"], image_tokens)
    behind = whole.index(reader.vision_end_id) + 1
    case.same("ids_after_vision_end", whole[behind:], row["ids_after_vision_end"])
    case.same("total_len", len(whole), row["total_len"])
    case.same("id0_count_in_total", whole.count(conditioner.PAD_ID), row["id0_count_in_total"])

    states = torch.tensor(whole, dtype=torch.float64).view(1, -1, 1)
    window = conditioner.keep_window(
        states, torch.tensor([len(whole)]), config.prefix_length, config.text_length
    )
    kept_len = int(window.prompt_mask.sum())
    kept = [int(token) for token in window.prompt_embeds[0, :kept_len, 0]]
    case.same("kept_len", kept_len, row["kept_len"])
    case.same("kept_first_ids", kept[: len(row["kept_first_ids"])], row["kept_first_ids"])
    case.same("kept_last_ids", kept[-len(row["kept_last_ids"]) :], row["kept_last_ids"])
    case.same("truncated", len(whole) - config.prefix_length > config.text_length, row["truncated"])


# The first pieces of v1.2, which are the same for every prompt.
V1_2_HEAD = [
    "<|im_start|>",
    "system\nYou are a helpful assistant.",
    "<|im_end|>",
    "\n",
    "<|im_start|>",
]


def check_split_string_v1_2(case: Case) -> None:
    config = V1_2.conditioner
    sidecar = case.sidecar
    case.same("drop_tokens", config.prefix_length, sidecar["drop_tokens"])
    case.same("max_length", config.text_length, sidecar["max_length"])
    case.same("prefix_chars", len(config.prompt_prefix), sidecar["prefix_chars"])
    reader = conditioner_v1_2.ConditionerV12(_unread_model(), published_tokenizer(), config)
    for row in case.rows:
        text = conditioner.render_chat(row["prompt"], config)
        pieces = conditioner_v1_2.split_quotes_v1_2(text, config.quote_start, reader.special_tokens)
        case.same("pieces of the head", [piece.text for piece in pieces[:5]], V1_2_HEAD)
        parts = pieces[5:]
        case.same("parts", [piece.text for piece in parts], row["parts"])
        case.same("in_quotation", [piece.is_quoted for piece in parts], row["in_quotation"])
        tokens = reader.tokenize(row["prompt"], num_image_tokens=1)
        total, start = len(tokens.ids), config.prefix_length
        case.same("total_len", total, row["total_len_with_single_image_pad"])
        case.same("ids_from_90", tokens.ids[start:], row["ids_from_90"])
        mask = [int(is_quoted) for is_quoted in tokens.is_quoted[start:]]
        case.same("text_mask_from_90", mask, row["text_mask_from_90"])


def check_v1_2_position_ids(case: Case) -> None:
    config = V1_2.conditioner
    vlm = _unread_model()
    for row in case.table("cases"):
        name, source, seen = row["index"], row["ref_image_wh"], row["vlm_wh"]
        size = conditioner.vlm_image_size(
            source[0], source[1], config.min_pixels, config.max_pixels
        )
        grid = [seen[1] // conditioner.FACTOR, seen[0] // conditioner.FACTOR]
        case.same("vlm_wh", list(size), seen)
        case.same("vision_grid_hw", grid, row["vision_grid_hw"])
        is_image = [False] * row["tokens_before"] + [True] * math.prod(grid)
        is_image += [False] * row["tokens_after"]
        recorded = case.tensors[f"{name}.vision_mask"].bool()
        case.same(f"{name}.vision_mask", is_image, recorded.tolist())

        positions = case.tensors[f"{name}.mrope_positions_after_cut"]
        grid_thw = torch.tensor([1, 2 * grid[0], 2 * grid[1]])
        before = int(positions[0, 0])  # text tokens that were dropped
        types = torch.nn.functional.pad(recorded.int(), (before, 0)).unsqueeze(0)
        found, _ = vlm.get_rope_index(types.long(), types, image_grid_thw=grid_thw.unsqueeze(0))
        case.expect(f"{name}.mrope_positions_after_cut", found[:, 0, before:].T, EXACT)
        # The inputs of the reference's positions: from pixels to the grid of image tokens.
        scales = [(v - 1) / (s - 1) / conditioner.FACTOR for v, s in zip(seen, source, strict=True)]
        shift = -conditioner_v1_2.TOKEN_CENTRE / conditioner.FACTOR
        affine = torch.tensor([[scales[0], 0, shift], [0, scales[1], shift], [0, 0, 1]])
        case.expect(f"{name}.affine_pixel_to_vision", affine, ONE_ROUNDING)
        ids = conditioner_v1_2.text_position_ids(positions, recorded, grid_thw, tuple(source))
        case.expect(f"{name}.txt_ids", ids, ONE_ROUNDING)
        # The error of our closed form against the reference, as the makers of the case measured it.
        case.note("closed_form_max_abs_diff", row["closed_form_max_abs_diff"], ONE_ROUNDING)


def _unread_model() -> Qwen2_5_VLModel:
    """A model without weights: only its rules for texts and positions are used."""
    config = Qwen2_5_VLConfig(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1})
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


def check_v1_2_rules(case: Case) -> None:
    tables = case.sidecar.keys() - {"case", "kind", "notes"}
    case.same("names of the tables", tables, RULES.keys())
    for name, rule in RULES.items():
        for row in case.table(name):
            found, expected = rule(row)
            case.same(name, found, expected)


Rule = Callable[[Row], tuple[object, object]]
"""The result of our rule for a row, and the recorded one."""


def _rule_verdict(row: Row) -> tuple[object, object]:
    cleaned = reasoning.clean_verdict(row["text"])
    return (cleaned is not None, cleaned), (row["valid"], row["cleaned"])


def _rule_interpretation(row: Row) -> tuple[object, object]:
    return tuple(reasoning.read_verdict(row["text"])), (
        row["validate_string"],
        row["success"],
        row["refine_prompt"],
    )


def _rule_score_caps(row: Row) -> tuple[object, object]:
    """Without the texts of the trace: `cap<9: ...` keeps only the number, rounded up."""
    consistency, recorded = reasoning.cap_score(row["obj"]), row["result"]
    if consistency is None or recorded is None:
        return consistency, recorded
    found = vars(consistency) | {"caps": [math.ceil(cap) for cap in consistency.caps]}
    caps = [int(re.sub(r"^cap<=?(\d+): .*", r"\1", text)) for text in recorded["cap_trace"]]
    expected = {name: value for name, value in recorded.items() if name != "cap_trace"}
    return found, expected | {"caps": caps}


def _rule_rating(row: Row) -> tuple[object, object]:
    rating = reasoning.parse_rating(row["text"])
    found = None if rating is None else vars(rating) | {"score": list(rating.score)}
    return (rating is not None, found), (row["valid"], row["parsed"])


def _rule_best(row: Row) -> tuple[object, object]:
    rounds = [
        reasoning.Round(
            _picture(0), "", _picture(0), reasoning.Reflection(verdict), _ranking(scores)
        )
        for scores, verdict in zip(row["scores"], row["think_info"], strict=True)
    ]
    return reasoning.best_round(rounds), row["best_index"]


SCENARIO = {"prompt", "thinking", "think", "reflection", "rounds", "max_try_cnt"}
SCENARIO_ROUND = {"reflection", "scores"}


def _check_known(what: str, given: Row, known: Set[str]) -> None:
    """Raise ValueError for requested fields that would be ignored."""
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{what} has unknown fields: {', '.join(unknown)}")


def _rule_loop(row: Row) -> tuple[object, object]:
    """Run the loop with a scripted reasoner; pictures are identified by their pixel."""
    scenario, recorded = row["scenario"], row["result"]
    _check_known("the scenario", scenario, SCENARIO)
    for each in scenario["rounds"]:
        _check_known("a round of the scenario", each, SCENARIO_ROUND)
    reasoner = _Scripted(scenario)
    pictures = itertools.count(1)
    plan = reasoning.ReasoningPlan(
        scenario["thinking"],
        scenario["reflection"],
        scenario.get("max_try_cnt", reasoning.ReasoningPlan.max_rounds),
    )

    def edit(*_: object) -> Generator[None, None, Pixels]:
        yield
        return _picture(next(pictures))

    *_, result = reasoning.reason(reasoner, edit, _picture(0), scenario["prompt"], plan)
    assert isinstance(result, reasoning.Reasoned)
    rounds = result.rounds
    reflections = [round_.reflection.verdict for round_ in rounds if round_.reflection]
    found = {
        "edit_from": [_name(round_.source) for round_ in rounds],
        "edit_prompt": [round_.prompt for round_ in rounds],
        "negative_prompt": [NetworkRequest.negative_prompt for _ in rounds],
        "reflect_calls": reasoner.calls,
        "images": [_name(round_.image) for round_ in rounds],
        "final_images": [_name(result.image)],
        "reformat_prompt": result.rewritten_prompt,
        "think_info": reflections,
        "best_info_count": sum(round_.ranking is not None for round_ in rounds),
    }
    # It is null if nothing was requested.
    nothing = {"think_info": [], "best_info_count": 0}
    expected = {
        name: nothing.get(name) if value is None else value for name, value in recorded.items()
    }
    return found, expected


class _Scripted(reasoning.Reasoner[None]):
    """Replays the replies of a scenario and records the reflection requests."""

    def __init__(self, scenario: Row) -> None:
        self.scenario = scenario
        self.calls: list[dict[str, str]] = []

    def think(self, source: Pixels, instruction: str) -> Generator[None, None, str]:
        yield
        return str(self.scenario["think"])

    def reflect(
        self, source: Pixels, edited: Pixels, instruction: str
    ) -> Generator[None, None, reasoning.Reflection]:
        yield
        self.calls.append(
            {"source": _name(source), "result": _name(edited), "instruction": instruction}
        )
        return reasoning.Reflection(self.scenario["rounds"][len(self.calls) - 1]["reflection"])

    def rank(
        self, source: Pixels, edited: Pixels, instruction: str
    ) -> Generator[None, None, reasoning.Ranking]:
        yield
        scores = self.scenario["rounds"][len(self.calls) - 1]["scores"]
        return _ranking({name: rating["score"] for name, rating in scores.items()})


def _ranking(scores: Row) -> reasoning.Ranking:
    ratings = [reasoning.Rating(tuple(scores[name])) for name in ("score1", "score2")]
    return reasoning.Ranking(*ratings)


def _picture(number: int) -> Pixels:
    return np.full((1, 1, 3), number, dtype=np.uint8)


def _name(picture: Pixels) -> str:
    number = int(picture[0, 0, 0])
    return f"output_{number}" if number else "original"


RULES: Mapping[str, Rule] = {
    "language": lambda row: (reasoning.language_word(row["text"]), row["result"]),
    "parse_json_block": lambda row: (reasoning.parse_json_block(row["text"]), row["result"]),
    "score_caps": _rule_score_caps,
    "validate_reflection_response": _rule_verdict,
    "validate_string_and_format_text": _rule_interpretation,
    "score_response": _rule_rating,
    "best_image": _rule_best,
    "loop_control": _rule_loop,
}


# ----------------------------------------------------------------------------- the network


def connector_config(config: Mapping[str, Any]) -> ConnectorConfig:
    """Read the sizes of a connector from a sidecar."""
    return ConnectorConfig(
        in_features=config["connector_in"],
        hidden_size=config["connector_hidden"],
        num_heads=config["connector_heads"],
        depth=config["connector_depth"],
        has_scale_factor=PRESETS[config["version"]].transformer.connector.has_scale_factor,
    )


def transformer_config(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the sizes of a transformer from a sidecar; missing ones are as published."""
    published = TransformerConfig()
    return TransformerConfig(
        in_channels=config.get("in_channels", published.in_channels),
        out_channels=config.get("out_channels", published.out_channels),
        hidden_size=config["hidden"],
        num_heads=config["heads"],
        axes_dim=tuple(config["axes_dim"]),
        theta=config.get("theta", published.theta),
        depth=config["depth"],
        depth_single=config["depth_single"],
        mlp_ratio=config.get("mlp_ratio", published.mlp_ratio),
        vec_in_dim=config.get("vec_in_dim", published.vec_in_dim),
        has_text_token_mapping=config["version"] == V1_2.version,
        connector=connector_config(config),
    )


def build(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> Transformer:
    """Create a transformer from official tensors, with or without the factor of v1.0."""
    has_factor = keymap.SCALE_FACTOR in tensors
    sizes = dict(vars(config)) | {
        "connector": ConnectorConfig(**vars(config.connector) | {"has_scale_factor": has_factor})
    }
    transformer = Transformer(TransformerConfig(**sizes))
    transformer.load_state_dict(tensors)
    return transformer.eval()


def transformer_tensors(case: Case) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the weights in the official layout, from each layout that the case has."""
    official = case.load("weights_official")
    yield "official", official
    links = keymap.transformer_links(transformer_config(case.sidecar["config"]))
    translated = keymap.to_diffusers(fold_scale_factor(official), links)
    diffusers = _check_layout(case, translated)
    yield "diffusers", keymap.to_official(diffusers, links)


def fold_scale_factor(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite official v1.0 weights for the structure without `scale_factor`.

    The factor multiplies the pooled text before the projection, so it can instead multiply the
    projection's weight (not its bias). Diffusers checkpoints of v1.0 are stored this way; weights
    without the factor are returned unchanged.
    """
    folded = dict(tensors)
    scale_factor = folded.pop(keymap.SCALE_FACTOR, None)
    if scale_factor is not None:
        projection = "connector.global_proj_out.weight"
        weight = folded[projection]
        folded[projection] = (weight.float() * (1 + scale_factor.float())).to(weight.dtype)
    return folded


def _check_layout(case: Case, translated: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compare converted weights with the recorded ones; return the recorded ones, if present."""
    if "weights_diffusers" in case.sidecar["files"]:
        recorded = case.load("weights_diffusers")
        case.same("diffusers names", translated.keys(), recorded.keys())
        for name, tensor in recorded.items():
            case.compare("diffusers weights", translated[name], tensor, EXACT)
        return recorded
    hashes = case.sidecar["weights_diffusers_sha256"]
    dtype = getattr(torch, case.sidecar.get("weights_dtype", "float32").split()[0])
    found = {name: sha256(tensor.to(dtype)) for name, tensor in translated.items()}
    case.same("diffusers weights", found, hashes)
    return translated


def sha256(tensor: Tensor) -> str:
    """Return the hash of a tensor's bytes, as stored in a safetensors file."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def check_connector_forward(case: Case) -> None:
    config = connector_config(case.sidecar["config"])
    weights = {
        name.removeprefix("connector."): tensor for name, tensor in case.load("weights").items()
    }
    connector = Connector(config, vec_dim=weights["global_proj_out.bias"].shape[0]).eval()
    connector.load_state_dict(weights)
    x, t, mask = (case.tensors[f"in.{name}"] for name in ("x", "t", "mask"))
    tolerance = min(NETWORK, case.atol)
    with Recorder(connector) as recorded:
        text, vector = connector(x, mask, t.unsqueeze(0))
    case.expect("out.encoder_hidden_states", text.squeeze(0), tolerance)
    case.expect("out.global_out", vector, tolerance)

    found = {
        "timestep_sinusoid": timestep_embedding(t),
        "masked_mean": masked_mean(x, mask),
        "t_embedder": recorded["S.t_embedder"].squeeze(0),
        "c_embedder": recorded["S.c_embedder"],
        "input_embedder": recorded["S.input_embedder"],
    }
    for i in range(config.depth):
        block = recorded[f"S.individual_token_refiner.blocks.{i}"]
        found[f"block.{i}"] = block.squeeze(0)
    _expect_intermediates(case, found, tolerance)


def check_dit_forward(case: Case) -> None:
    config = transformer_config(case.sidecar["config"])
    inputs = {name.removeprefix("in."): t for name, t in case.tensors.items() if name[:3] == "in."}
    tolerance = min(NETWORK, case.atol)
    preset = PRESETS[case.sidecar["config"]["version"]]
    batch, text_tokens = inputs["mask"].shape
    rows, cols = (side // 2 for side in case.sidecar["latent_hw"])
    quoted = None
    if config.has_text_token_mapping:
        quoted = QuotedText(inputs["text_embeddings"], inputs["text_mask"])
    ids = latents.image_position_ids(rows, cols, preset.reference_offset)
    case.expect("in.img_ids", ids.expand(batch, -1, -1), EXACT)
    for layout, tensors in transformer_tensors(case):
        transformer = build(config, tensors)
        with Recorder(transformer) as recorded:
            velocity = transformer(
                inputs["img"],
                inputs["img_ids"],
                inputs["llm_embedding"],
                inputs["mask"],
                inputs["timesteps"],
                inputs["txt_ids"],
                quoted=quoted,
            )
        case.expect("out.pred", velocity, tolerance)
        case.compare(f"{layout} layout", velocity, case.tensors["out.pred"], tolerance)
        rope = transformer.rope(ids, text_tokens, inputs["txt_ids"][0]).squeeze(0)
        if "out.pe_cos" in case.outputs():
            case.expect("out.pe_cos", rope[..., 0], EXACT)
            case.expect("out.pe_sin", rope[..., 1], EXACT)
        found = {
            "connector.encoder_hidden_states": recorded["connector"][0].squeeze(0),
            "connector.global_out": recorded["connector"][1],
            "img_in": recorded["img_in"],
            "time_in": recorded["time_in"].squeeze(0),
            "vector_in": recorded["vector_in"],
            "txt_in": recorded["txt_in"].squeeze(0),
        }
        if quoted is not None:
            mapped = recorded["text_token_mapping"] * quoted.mask.unsqueeze(-1)
            found["text_hidden_sum"] = found["connector.encoder_hidden_states"] + mapped
        for i in range(config.depth):
            found[f"double_blocks.{i}.img"], found[f"double_blocks.{i}.txt"] = recorded[
                f"double_blocks.{i}"
            ]
        for i in range(config.depth_single):
            found[f"single_blocks.{i}"] = recorded[f"single_blocks.{i}"]
        _expect_intermediates(case, found, tolerance)


def check_denoise_loop(case: Case) -> None:
    """Sample as the pipeline does: prologue for all steps, then the core with both branches.

    Without a reference the picture is generated from the text alone.
    """
    sidecar = case.sidecar
    preset: ModelConfig = PRESETS[sidecar["config"]["version"]]
    weights = case.other(sidecar["weights_from"]).load("weights_official")
    transformer = build(transformer_config(sidecar["config"]), weights)
    tolerance = min(LOOP, case.atol)
    _same_damping_constants(case, sidecar["timesteps_truncate"])

    rows, cols = (side // 2 for side in sidecar["latent_hw"])
    start = latents.pack(case.tensors["in.latent"])
    reference = start[:, :0]
    ids = latents.position_ids(rows, cols)
    if "in.ref_latent" in case.tensors:
        reference = latents.pack(case.tensors["in.ref_latent"])
        ids = latents.image_position_ids(rows, cols, preset.reference_offset)
    prompt_embeds, mask = case.tensors["in.llm_embedding"], case.tensors["in.mask"]
    batch, num_tokens = prompt_embeds.shape[0], start.shape[1]
    case.expect("in.packed", torch.cat([start, reference], 1).expand(batch, -1, -1), EXACT)
    case.expect("in.img_ids", ids.expand(batch, -1, -1), EXACT)

    schedule = flow.schedule(sidecar["steps"], num_tokens)
    timesteps = schedule.tolist()
    case.same("schedule", timesteps, sidecar["schedule"])
    prologue = transformer.prologue(prompt_embeds, mask, schedule[:-1])
    text_length = prompt_embeds.shape[1]
    layout = Layout(transformer.rope(ids, text_length), text_length)

    def sample(rule: GuidanceRule) -> tuple[Tensor, Tensor, Tensor]:
        x, states, velocities = start, [], []
        for i, (t, t_next) in enumerate(itertools.pairwise(timesteps)):
            tokens = torch.cat([x, reference], dim=1).expand(batch, -1, -1)
            velocity = transformer.core(tokens, prologue[i], layout)
            states.append(x[0])
            velocities.append(velocity)
            cond, uncond = velocity[:, :num_tokens].chunk(2)
            guided = flow.guide(cond, uncond, sidecar["cfg_guidance"], t, rule)
            x = flow.euler_step(x, guided, t, t_next)
        return x, torch.stack(states), torch.stack(velocities)

    official = GuidanceRule.OFFICIAL
    damped = [flow.is_damped(t, official) for t in timesteps[:-1]]
    case.same("branch_power_rule", damped, sidecar["branch_power_rule"])
    final, states, velocities = sample(official)
    case.expect("out.final_packed", final, tolerance)
    case.expect("out.final_latent", latents.unpack(final, rows, cols), tolerance)
    if "out.states_packed" in case.outputs():
        case.expect("out.states_packed", states, tolerance)
    if "out.preds_full" in case.outputs():
        case.expect("out.preds_full", velocities, tolerance)
    final, _, _ = sample(GuidanceRule.ALWAYS)
    case.expect("out.final_packed_fork_semantics", final, tolerance)


def check_lora_merge(case: Case) -> None:
    """Add a LoRA to the weights of another case and run that case again with them."""
    base = case.other(case.sidecar["weights_from"])
    config = transformer_config(base.sidecar["config"])
    weights = base.load("weights_official")
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    links = keymap.transformer_links(config)
    file = case.path.parent / case.sidecar["files"]["lora"]
    lora = read_lora(file, shapes, links)
    changed = [f"{module}.weight" for module in case.sidecar["modules"]]
    case.same("modules", sorted(lora.changes), sorted(changed))
    products = [change for change in lora.changes.values() if isinstance(change, LowRank)]
    ranks = {change.down.shape[0] for change in products}
    alphas = {change.scale * change.down.shape[0] for change in products}
    case.same("rank and alpha", (ranks, alphas), ({case.sidecar["rank"]}, {case.sidecar["alpha"]}))
    expected = dict(case.tensors)
    links_by_name = {link.official: link for link in links}
    for name, weight in weights.items():
        if name not in links_by_name:
            continue
        used = [(lora, case.sidecar["multiplier"])]
        delta = delta_of(links_by_name[name], used, weight.float)
        if delta is not None:
            recorded = expected.pop(f"merged.{name}")
            case.compare("merged weights", weight + delta, recorded, ONE_ROUNDING)
            weights[name] = weight + delta
    inputs = {name.removeprefix("in."): tensor for name, tensor in base.tensors.items()}
    velocity = build(config, weights)(
        inputs["img"],
        inputs["img_ids"],
        inputs["llm_embedding"],
        inputs["mask"],
        inputs["timesteps"],
        inputs["txt_ids"],
    )
    case.compare("pred", velocity, expected.pop("pred"), min(NETWORK, case.atol))
    case.same("all recorded weights are compared", list(expected), [])


def check_vae(case: Case) -> None:
    config = case.sidecar["config"]
    widths = [config["ch"] * factor for factor in config["ch_mult"]]
    layers = config["num_res_blocks"]
    case.same("scale_factor", config["scale_factor"], V1_1.latent_scale)
    case.same("shift_factor", config["shift_factor"], V1_1.latent_shift)
    official = case.load("weights_official")
    links = keymap.vae_links(widths, layers)
    diffusers = _check_layout(case, keymap.to_diffusers(official, links))
    again = keymap.to_official(diffusers, links)
    for name, tensor in official.items():
        case.compare("official weights", again[name], tensor, EXACT)

    config = AutoencoderConfig(tuple(widths), layers, config["z_channels"])
    vae = Autoencoder(config).eval()
    vae.load_state_dict(diffusers)
    tolerance = min(NETWORK, case.atol)
    moments = vae.encoder(case.tensors["in.image"])
    std = moments.chunk(2, dim=1)[1].clamp(-30, 20).mul(0.5).exp()
    mean = vae.encode(case.tensors["in.image"])
    z = case.tensors["in.latent"] / V1_1.latent_scale + V1_1.latent_shift
    case.expect("out.moments", moments, tolerance)
    case.expect("out.latent_mean_scaled", V1_1.latent_scale * (mean - V1_1.latent_shift), tolerance)
    case.expect("out.std", std, tolerance)
    case.expect("out.decoded", vae.decode(z), tolerance)


class Recorder:
    """Records the output of every module, by its name, while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self.outputs: dict[str, Any] = {}
        self.handles = [
            child.register_forward_hook(self._hook(name)) for name, child in module.named_modules()
        ]

    def __enter__(self) -> dict[str, Any]:
        return self.outputs

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            self.outputs[name] = output

        return keep


def _expect_intermediates(case: Case, found: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare those that the case has; the others were left out to save space."""
    for name in case.outputs():
        if name.startswith("out.inter."):
            case.expect(name, found[name.removeprefix("out.inter.")], tolerance)


def _same_damping_constants(case: Case, threshold: float) -> None:
    case.same("threshold", threshold, flow.DAMPED_ABOVE)
    case.same("power", case.sidecar["power"], flow.DAMPING_POWER)


CHECKS: Mapping[str, Check] = {
    "cfg_combine": check_cfg_combine,
    "connector_forward": check_connector_forward,
    "denoise_loop": check_denoise_loop,
    "denoise_loop_t2i": check_denoise_loop,
    "dit_forward": check_dit_forward,
    "dit_forward_v1_2": check_dit_forward,
    "lora_merge": check_lora_merge,
    "pack": check_pack,
    "rope": check_rope,
    "schedule": check_schedule,
    "sizing": check_sizing,
    "split_string_v1": check_split_string_v1,
    "split_string_v1_2": check_split_string_v1_2,
    "v1_2_position_ids": check_v1_2_position_ids,
    "v1_2_rules": check_v1_2_rules,
    "vae": check_vae,
}


# ----------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """One line of the report."""

    name: str
    verdict: str
    difference: float = 0.0
    tolerance: float = 0.0
    problems: Sequence[str] = ()

    def __str__(self) -> str:
        numbers = f"{self.difference:10.3g}  <= {self.tolerance:<10.3g}"
        shown = "; ".join(self.problems[:3]) + (" ..." if len(self.problems) > 3 else "")
        return f"{self.name:28} {numbers} {self.verdict}  {shown}".rstrip()


def run_case(path: Path) -> Outcome:
    """Check one case. Any problem with its files makes it fail."""
    case = Case(path)
    try:
        kind = case.sidecar["kind"]
        if kind not in CHECKS:
            return Outcome(path.stem, "FAIL", math.nan, problems=[f"unknown kind {kind}"])
        with torch.no_grad():
            CHECKS[kind](case)
        problems = case.failures()
    except Exception as error:  # noqa: BLE001 - a damaged case must fail, not end the report
        text = " ".join(str(error).split())[:200]
        return Outcome(path.stem, "FAIL", math.nan, problems=[f"{type(error).__name__}: {text}"])
    if not case.differences:
        return Outcome(path.stem, "FAIL", math.nan, problems=["nothing was compared"])
    difference, tolerance = worst(case.differences.values())
    return Outcome(path.stem, "FAIL" if problems else "PASS", difference, tolerance, problems)


def worst(differences: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the largest difference, among those beyond their tolerance if there are any."""

    def badness(pair: tuple[float, float]) -> tuple[bool, float]:
        difference, tolerance = pair
        size = math.inf if math.isnan(difference) else difference
        return not difference <= tolerance, size

    by_tolerance = sorted(differences, key=lambda pair: pair[1], reverse=True)
    return max(by_tolerance, key=badness)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the network with recorded numbers.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a directory of golden cases")
    parser.add_argument("--case", metavar="NAME", help="run this case only")
    arguments = parser.parse_args(argv)
    paths = sorted(arguments.directory.glob(f"{arguments.case or '*'}.json"))
    if not paths:
        print(f"no case {arguments.case or ''} in {arguments.directory}", file=sys.stderr)
        return 1
    verdicts = []
    for path in paths:
        outcome = run_case(path)
        print(outcome, flush=True)
        verdicts.append(outcome.verdict)
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("PASS", "FAIL"))
    print(counts)
    return 1 if "FAIL" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
