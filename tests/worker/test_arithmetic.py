"""Which numbers a CPU computes with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from step1x_edit.channel import Start
from step1x_edit.model.processor import bfloat16_instructions
from step1x_edit.worker.arithmetic import FILE, arithmetic_of, fastest, measure_gains, numerics_of
from step1x_edit.worker.opening import open_chosen

FAST = {"products": 2.5, "convolutions": 2.0}
SLOW = {"products": 2.5, "convolutions": 0.7}


@pytest.fixture(autouse=True)
def _asked_again() -> Iterator[None]:
    """The processor is asked again in each test, and after it."""
    bfloat16_instructions.cache_clear()
    yield
    bfloat16_instructions.cache_clear()


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX512_BF16, whatever this one has."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(
    ("gains", "later", "dtype"), [(FAST, SLOW, torch.bfloat16), (SLOW, FAST, torch.float32)]
)
def test_what_is_found_first_stays(
    tmp_path: Path, gains: dict[str, float], later: dict[str, float], dtype: torch.dtype
) -> None:
    found = [fastest(tmp_path, partial(dict, each)) for each in (gains, later)]

    assert found == [dtype, dtype]


@pytest.mark.usefixtures("bfloat16")
def test_another_torch_and_a_damaged_file_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(tmp_path, lambda: FAST)
    monkeypatch.setattr(torch, "__version__", "9.9")

    assert fastest(tmp_path, lambda: SLOW) is torch.float32
    assert len(json.loads((tmp_path / FILE).read_text())) == 2

    for damaged in ("{", "[" * 100_000):
        (tmp_path / FILE).write_text(damaged)
        assert fastest(tmp_path, lambda: FAST) is torch.bfloat16


@pytest.mark.usefixtures("bfloat16")
def test_a_folder_that_cannot_be_written_prevents_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert fastest(tmp_path / "file", lambda: FAST) is torch.bfloat16

    (tmp_path / FILE).mkdir(parents=True)
    assert fastest(tmp_path, lambda: FAST) is torch.bfloat16
    assert list((tmp_path / FILE).parent.iterdir()) == [tmp_path / FILE]


def test_a_processor_without_bfloat16_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    def measure() -> dict[str, float]:
        pytest.fail("measured")

    assert fastest(tmp_path, measure) is torch.float32
    assert {arithmetic_of(torch.float32), arithmetic_of(torch.bfloat16)} == {"fp32 avx2"}
    assert not (tmp_path / FILE).exists()


@pytest.mark.usefixtures("bfloat16")
def test_the_instructions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arithmetic_of(torch.bfloat16) == "bf16 avx512_bf16"
    assert arithmetic_of(torch.float32) == "fp32 avx512"
    bfloat16_instructions.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert arithmetic_of(torch.bfloat16) == "bf16 amx"


def test_what_else_the_bytes_depend_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")

    assert numerics_of("cpu") == "cpu/avx512/2 threads/torch 2.13.0"

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert numerics_of("cuda:0") == "NVIDIA H200/torch 2.13.0"


def test_measuring_compares_every_kind_of_work() -> None:
    assert measure_gains().keys() == FAST.keys()


@pytest.mark.parametrize(
    ("arithmetic", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_setting_decides_what_the_demo_computes_with(
    tmp_path: Path, arithmetic: str, dtype: torch.dtype
) -> None:
    start = Start(device="cpu", data_dir=str(tmp_path), arithmetic=arithmetic)  # type: ignore[arg-type]

    weights = {weight.name: weight.dtype for weight in open_chosen(start).weights}

    assert weights["transformer.img_in.weight"] is dtype
    assert weights["vae.decoder.conv_in.weight"] is dtype
    assert not (tmp_path / FILE).exists()
