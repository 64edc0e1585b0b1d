"""The check for a GPU runs to its end on the stand-in, and would say so if our path were wrong.

Its speeds mean nothing here; that each is there, and that the comparison can fail, does.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")  # the peer

from gpu.bench import SMALL, Bench, block_tflop
from gpu.coded import coded_blocks
from gpu.memory import Cap, capped, opened_from, streaming
from gpu.networks import PlainNetwork, encoded_prompts, our_network, plain_velocities
from gpu.sections import correctness, exact_compiled, peer_compiled
from gpu_check import SECTIONS, Report, Section, main, run_sections, table
from step1x_edit.model import blocks
from step1x_edit.model.quantised import CODES, QuantLinear
from step1x_edit.worker.residency import Residency, allocate_slab

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
FACTS = {
    "device": "a stand-in",
    "driver": "none",
    "torch": torch.__version__,
    "commit": "unknown",
    "date": "2026-11-25",
    "dtype": "bfloat16",
}
SPEEDS = ("baseline", "exact", "peer", "exact_compiled", "exact_flash", "peer_compiled")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and on a loaded machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--out", str(out)]
    command += ["--limit", "6000"]  # no section is cut, however slow the machine is
    return subprocess.run(command, capture_output=True, text=True, check=False), out


@pytest.mark.timeout(700)
def test_every_section_reports(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = run
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.iterdir()
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == json.loads(file.read_text("utf-8"))
    assert told["date"] in file.name
    assert "stand-in" in file.name
    found = told["sections"]
    assert list(found) == [section.name for section in SECTIONS]
    assert {name: section["status"] for name, section in found.items()} == dict.fromkeys(
        found, "ran"
    )
    for name in SPEEDS:
        assert [row["pixels"] for row in found[name]["rows"]] == list(SMALL.pictures)
        assert all(0 < row["step_min_ms"] <= row["step_ms"] for row in found[name]["rows"])
    assert [row["loop_is"] for row in found["exact"]["rows"]] == ["measured", "extrapolated"]
    assert set(found["again"]) >= {"baseline", "exact", "peer"}
    assert found["correctness"]["is_right"]
    assert found["exact_compiled"]["is_right"]
    assert found["exact_compiled"]["graphs"] > 0
    assert 0 < found["exact"]["latents_from_baseline"] < 0.1
    exact, fast, turbo, _ = (loop["evaluations"] for loop in found["turbo"]["loops"][:4])
    assert exact > fast > turbo > 0
    assert found["residency"]["onload_gb_per_s"] > 0
    assert found["probe"]["memory_gb_per_s"] > 0
    assert [group["distance"] for group in found["several"]["groups"]] == [0]
    blocks = {row["precision"]: row for row in found["coded_blocks"]["blocks"]}
    assert list(blocks) == ["bf16", *CODES]
    assert all(row["ms"] > 0 and row["compiled_ms"] > 0 for row in blocks.values())
    errors = [blocks[name]["from_float32"] for name in ("bf16", "int8", "fp8", "nf4")]
    assert errors == sorted(errors)


def test_caps_make_blocks_pass_and_change_no_number(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    told = json.loads(run[0].stdout.splitlines()[-1])
    whole, *capped = told["sections"]["streaming"]["rows"]
    assert (whole["cap_gb"], whole["slots"]) == (None, 0)
    assert [row["cap_gb"] for row in capped] == list(SMALL.caps_gb)
    assert capped[-1]["slots"] > 0
    assert capped[-1]["core_share"] == 0
    assert all(row["is_right"] is True for row in capped)


def test_the_table_has_a_row_for_each_path_and_size(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    lines = run[0].stdout.splitlines()
    assert "torch " + torch.__version__ in lines[0]
    assert "stand-in" in lines[0]
    for name in (*SPEEDS, "baseline, again", "exact, again", "peer, again"):
        for pixels in SMALL.pictures:
            assert any(line.startswith(f"| {name} | {pixels} |") for line in lines), name


@pytest.mark.parametrize("failures", [1, 3])
def test_a_cap_that_is_too_tight_takes_a_quarter_of_the_core_at_a_time(failures: int) -> None:
    device = torch.device("cpu")
    bench = Bench(SMALL, device)
    opened = opened_from(bench.ours, SMALL.model)
    left = [failures]

    def allocate(size: int, device: torch.device) -> Tensor:
        if cap.gb is not None and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("too little")
        return allocate_slab(size, device)

    cap = Cap(device)
    residency = Residency(lambda: opened, device, allocate=allocate, plan=cap.plan)
    expected: dict[tuple[int, bool], Tensor] = {}
    capped(bench, residency, cap, expected)
    cap.set(3.0)

    row = capped(bench, residency, cap, expected)

    assert row["out_of_memory"] == failures
    assert row["core_share"] <= 1 - 0.25 * failures
    assert row["is_right"] is True


def test_the_work_of_a_step_is_what_torch_counts() -> None:
    model, device = SMALL.model, torch.device("cpu")
    pixels, text = 64, model.conditioner.text_length
    counted = []
    for depth_single in (1, 2):
        transformer = replace(model.transformer, depth_single=depth_single)
        network = our_network(transformer, device, torch.float32)
        encoded = encoded_prompts(model, pixels, SMALL.valid, device)
        plain = PlainNetwork(network, torch.float32)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            plain_velocities(plain, replace(model, transformer=transformer), encoded, [0])
        modulation = 2 * 2 * 3 * transformer.hidden_size**2
        counted.append(counter.get_total_flops() - depth_single * modulation)

    one_block = block_tflop(replace(model.transformer, depth=0, depth_single=1), text, 16)
    assert counted[1] - counted[0] == pytest.approx(1e12 * one_block)


def test_networks_that_were_compiled_leave_no_weights_behind() -> None:
    transformer = replace(SMALL.model.transformer, depth=0, depth_single=1)  # compiled soonest
    scale = replace(SMALL, model=replace(SMALL.model, transformer=transformer), pictures={32: 2})
    bench = Bench(scale, torch.device("cpu"))
    weights = [weakref.ref(bench.ours.single_blocks[0].linear1.weight)]
    weights += [weakref.ref(bench.peer.single_transformer_blocks[0].proj_mlp.weight)]
    exact_compiled(bench)
    peer_compiled(bench)

    bench.drop("ours", "peer")

    assert [weight() for weight in weights] == [None, None]


# --- the comparison can fail ----------------------------------------------------------------------


def checked(bench: Bench, tmp_path: Path) -> Report:
    report = Report(dict(FACTS))
    run_sections(bench, [Section(correctness, 600)], report, 600, tmp_path)
    return report


@pytest.mark.parametrize(
    "name",
    [
        "img_in.weight",
        "connector.S.individual_token_refiner.blocks.1.mlp.fc2.weight",
        "double_blocks.0.txt_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.0.linear1.weight",
        "final_layer.adaLN_modulation.1.bias",
    ],
)
@torch.no_grad()
def test_one_other_weight_is_noticed(name: str, tmp_path: Path) -> None:
    bench = Bench(SMALL, torch.device("cpu"))
    bench.reference = copy.deepcopy(bench.ours)
    assert checked(bench, tmp_path).is_good

    weight = bench.ours.get_parameter(name)
    weight.copy_(weight.roll(1, 0) if weight.std() > 0 else 1.5 * weight)

    report = checked(bench, tmp_path)
    assert not report.is_good
    assert report.found["correctness"]["status"].startswith("wrong")
    assert "wrong" in table(report)


def unturned(x: Tensor, rope: Tensor) -> Tensor:
    return x.float()


def swapped(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + shift) * blocks.layer_norm(x) + scale


@pytest.mark.parametrize(("name", "other"), [("apply_rope", unturned), ("modulate", swapped)])
def test_other_arithmetic_is_noticed_by_the_strict_comparison(
    name: str, other: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(blocks, name, other)

    report = checked(Bench(SMALL, torch.device("cpu")), tmp_path)

    assert not report.is_good
    found = report.found["correctness"]
    assert found["float32_shallow"] > 10 * found["float32_shallow_allowed"]


def test_numbers_that_are_not_finite_are_noticed(tmp_path: Path) -> None:
    bench = Bench(SMALL, torch.device("cpu"))
    bench.reference = copy.deepcopy(bench.ours)
    bench.ours.final_layer.linear.bias[0] = torch.nan

    assert not checked(bench, tmp_path).is_good


def test_codes_that_stand_for_other_weights_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = QuantLinear.weight
    monkeypatch.setattr(QuantLinear, "weight", lambda self, dtype: usual(self, dtype).roll(1, 0))
    monkeypatch.setattr("gpu.coded.CODES", ("fp8",))
    report = Report(dict(FACTS))

    todo = [Section(coded_blocks, 600)]
    run_sections(Bench(SMALL, torch.device("cpu")), todo, report, 600, tmp_path)

    assert report.found["coded_blocks"]["status"].startswith("wrong")


# --- time is limited ------------------------------------------------------------------------------


def test_sections_without_time_are_named(tmp_path: Path) -> None:
    report = Report(dict(FACTS))
    run_sections(Bench(SMALL, torch.device("cpu")), SECTIONS, report, 0, tmp_path)

    assert {section["status"] for section in report.found.values()} == {"not run: the time was up"}
    assert len(report.found) == len(SECTIONS)
    assert report.is_good
    assert "| probe | not run: the time was up |" in table(report)


def test_without_the_library_of_the_peer_everything_else_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_check.HAS_PEER", False)
    monkeypatch.setattr("gpu.sections.HAS_PEER", False)
    report = Report(dict(FACTS))
    todo = [section for section in SECTIONS if section.name in ("peer", "again", "peer_compiled")]
    run_sections(Bench(SMALL, torch.device("cpu")), todo, report, 600, tmp_path)

    told = {name: section["status"] for name, section in report.found.items()}
    missing = "not run: diffusers is not installed"
    assert told == {"peer": missing, "again": "ran", "peer_compiled": missing}
    assert "peer" not in report.found["again"]
    assert report.is_good


def test_rows_without_time_are_named(tmp_path: Path) -> None:
    report = Report(dict(FACTS))
    bench = Bench(SMALL, torch.device("cpu"))
    run_sections(bench, [Section(streaming, 0)], report, 600, tmp_path)

    found = report.found["streaming"]
    assert found["status"] == "in part"
    assert found["left_out"] == [None, *SMALL.caps_gb]


def test_a_section_that_fails_costs_no_other_its_figures(tmp_path: Path) -> None:
    def broken(bench: Bench) -> dict[str, Any]:
        raise RuntimeError("no kernel image is available\nand more")

    report = Report(dict(FACTS))
    todo = [Section(broken, 60), Section(correctness, 600)]
    run_sections(Bench(SMALL, torch.device("cpu")), todo, report, 600, tmp_path)

    assert report.found["broken"]["status"] == "failed: RuntimeError: no kernel image is available"
    assert report.found["correctness"]["status"] == "ran"
    assert not report.is_good


STUCK = ROOT / "tests" / "stuck_section.py"


def test_a_section_that_is_stuck_is_stopped_and_what_is_known_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, str(STUCK), str(tmp_path)]
    done = subprocess.run(
        command, cwd=SCRIPT.parent, capture_output=True, text=True, check=False, timeout=240
    )

    assert done.returncode == 3, done.stderr
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text("utf-8"))["sections"]
    assert found["stuck"]["status"] == "stopped: it was stuck when the time was up"
    assert json.loads(done.stdout.splitlines()[-1])["sections"] == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_can_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--tiny --device cpu" in capsys.readouterr().err
