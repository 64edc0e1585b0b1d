"""Models in GGUF, written with the gguf package: the same numbers, or one sentence."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFWriter,
    QuantError,
    quants,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from http_server import calling
from layouts import (
    narrow_pipeline,
    tiny_releases,
    tiny_releases_v1_2,
    write_diffusers,
    write_official,
    write_published,
)
from step1x_edit.checkpoints.gguf_blocks import AT_ONCE, PACKINGS
from step1x_edit.checkpoints.lora_file import read_lora
from step1x_edit.checkpoints.read import Checkpoint, Wanted, open_checkpoint, read_checkpoint
from step1x_edit.checkpoints.stored import stored_tensors
from step1x_edit.errors import CheckpointError
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings
from tiny import VAE, a_picture, tiny_pipeline, tiny_pipeline_v1_2

Tensors = Mapping[str, Tensor]
Bytes = npt.NDArray[np.uint8]
Kind = GGMLQuantizationType

FILE = "step1x-edit.safetensors"
F32, F16, BF16, Q8_0 = Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""The bytes at which formats that the package cannot write have their float16."""


def write_gguf(
    file: Path, tensors: Tensors, kind: Kind = F32, architecture: str = "flux", prefix: str = ""
) -> None:
    """As converters do: what has one side, or rows that do not fit, stays in float32."""
    writer = GGUFWriter(file, architecture)
    for name, tensor in tensors.items():
        numbers = tensor.float().contiguous().numpy()
        used = F32 if numbers.ndim == 1 or numbers.shape[-1] % GGML_QUANT_SIZES[kind][0] else kind
        writer.add_tensor(prefix + name, quants.quantize(numbers, used), raw_dtype=used)
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- numbers -------------------------------------------------------------------------------------


def blocks(kind: Kind, rows: int, columns: int) -> Bytes:
    """Rows in this format: random numbers if the package can write it, else random blocks."""
    random = np.random.default_rng(kind)
    try:
        return quants.quantize(random.standard_normal((rows, columns), dtype=np.float32), kind)
    except NotImplementedError:
        count, size = GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (rows, columns // count, size), dtype=np.uint8)
        for at in HALVES[kind.name]:
            scales = random.standard_normal((rows, columns // count, 1)).astype(np.float16)
            raw[:, :, at : at + 2] = scales.view(np.uint8)
        return raw.reshape(rows, -1)


FORMATS = [Kind(number) for number in PACKINGS]


@pytest.mark.parametrize("kind", [*FORMATS, Kind.MXFP4, F16, BF16], ids=lambda kind: kind.name)
def test_numbers_equal_those_of_the_gguf_package_to_the_bit(tmp_path: Path, kind: Kind) -> None:
    file, (rows, columns) = tmp_path / "model.gguf", (1025, 768)
    assert rows * columns > AT_ONCE
    raw = blocks(kind, rows, columns)
    writer = GGUFWriter(file, "flux")
    writer.add_tensor("some", np.ones(3, dtype=np.float32))
    writer.add_tensor("matrix", raw, raw_dtype=kind)
    finish(writer)
    expected = torch.from_numpy(quants.dequantize(raw, kind))

    stored = stored_tensors([file])["matrix"]

    assert stored.shape == (rows, columns)
    assert stored.size == raw.nbytes
    found = stored.read(torch.float32)
    assert torch.equal(found.view(torch.int32), expected.view(-1).view(torch.int32))
    assert torch.equal(stored.read(torch.bfloat16), expected.view(-1).bfloat16())
    assert torch.equal(stored.rows(1, 3).read(torch.float32), expected[1:3].flatten())


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def original(pipeline: EditPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    write_official(folder, pipeline)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model whose transformer is missing."""
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    (folder / FILE).unlink()
    return folder


@pytest.fixture(scope="module")
def tensors(original: Path) -> Tensors:
    return load_file(original / FILE)


def read(path: Path, pipeline: EditPipeline) -> Checkpoint:
    return read_checkpoint(path, Wanted(dtype=torch.float32, releases=tiny_releases(pipeline)))


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name].float()) for name in expected
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", [F32, BF16])
def test_official_names_are_read_from_a_folder_and_from_a_file(
    folder: Path, pipeline: EditPipeline, tensors: Tensors, kind: Kind, prefix: str
) -> None:
    file = folder / "model.GGUF"
    write_gguf(file, tensors, kind, prefix=prefix)

    for path in (folder, file):
        checkpoint = read(path, pipeline)
        assert same(checkpoint.pipeline.transformer.state_dict(), tensors)
        assert checkpoint.name == f"Step1X-Edit v1.1 (GGUF {kind.name})"


def test_names_of_diffusers_are_read(
    tmp_path: Path, pipeline: EditPipeline, tensors: Tensors
) -> None:
    write_diffusers(tmp_path, pipeline, shards=1)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    write_gguf(file.with_suffix(".gguf"), load_file(file))
    file.unlink()

    assert same(read(tmp_path, pipeline).pipeline.transformer.state_dict(), tensors)


def test_packed_rows_are_fused_and_split_in_files_of_diffusers(
    tmp_path: Path, pipeline: EditPipeline
) -> None:
    write_diffusers(tmp_path, pipeline, shards=1)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    exact = load_file(file)
    write_gguf(file.with_suffix(".gguf"), exact, Q8_0)
    file.unlink()
    parts = [exact[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"]
    rounded = [quants.dequantize(quants.quantize(part.numpy(), Q8_0), Q8_0) for part in parts]

    found = read(tmp_path, pipeline).pipeline.transformer.state_dict()

    fused = found["double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(fused, torch.from_numpy(np.concatenate(rounded)))


def test_safetensors_precede_a_gguf_of_the_same_version(
    folder: Path, original: Path, pipeline: EditPipeline, tensors: Tensors
) -> None:
    write_gguf(folder / "z.gguf", tensors, Q8_0)
    shutil.copy(original / FILE, folder / "a.safetensors")

    assert read(folder, pipeline).name == "Step1X-Edit v1.1"


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_packed_numbers_are_rounded_once_to_the_precision_of_the_plan(
    folder: Path, pipeline: EditPipeline, tensors: Tensors, precision: str
) -> None:
    write_gguf(folder / "model.gguf", tensors, Q8_0)
    unpacked = {name: torch.from_numpy(numbers) for name, numbers in rounded(tensors, Q8_0).items()}
    wanted = Wanted(precision=precision, releases=tiny_releases(pipeline))  # type: ignore[arg-type]

    opened = open_checkpoint(folder, wanted)
    found = read_checkpoint(folder, wanted)
    write_gguf(folder / "model.gguf", unpacked)
    expected = read_checkpoint(folder, wanted).pipeline.transformer.state_dict()

    assert same(found.pipeline.transformer.state_dict(), expected)
    assert opened.precision == f"{precision} from GGUF Q8_0"
    assert found.name == f"Step1X-Edit v1.1 (GGUF Q8_0, {precision})"


def rounded(tensors: Tensors, kind: Kind) -> dict[str, npt.NDArray[np.float32]]:
    """The numbers that `write_gguf` leaves."""
    found = {}
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if numbers.ndim > 1:
            with contextlib.suppress(QuantError):
                numbers = quants.dequantize(quants.quantize(numbers, kind), kind)
        found[name] = numbers
    return found


# --- the conditioner -----------------------------------------------------------------------------

LANGUAGE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "language_model.embed_tokens": "token_embd",
    "language_model.norm": "output_norm",
    "language_model.layers": "blk",
    "lm_head": "output",
}
VISION = {
    "visual.blocks": "v.blk",
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "visual.merger.ln_q": "v.post_ln",
    "visual.merger.mlp": "mm",
}


def renamed(name: str, names: Mapping[str, str]) -> str:
    for published, short in names.items():
        name = name.replace(published, short)
    return name


def write_conditioner(folder: Path, state: Tensors, kind: Kind = F32) -> None:
    """Both files as llama.cpp's converter writes them."""
    language, vision = {}, {}
    for name, tensor in state.items():
        if not name.startswith("visual."):
            language[renamed(name, LANGUAGE)] = tensor
        elif "patch_embed" in name:
            vision["v.patch_embd.weight"] = tensor[:, :, 0]
            vision["v.patch_embd.weight.1"] = tensor[:, :, 1]
        elif ".qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                short = renamed(name, VISION).replace("attn.qkv", f"attn_{part}")
                vision[short] = rows
        else:
            vision[renamed(name, VISION)] = tensor
    write_gguf(folder / "Qwen-Q8_0.gguf", language, kind, "qwen2vl")
    writer = GGUFWriter(folder / "mmproj-F32.gguf", "clip")
    writer.add_clip_projector_type("qwen2.5vl_merger")
    for name, tensor in vision.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    finish(writer)


def test_a_conditioner_of_llama_cpp_equals_the_published_one(
    original: Path, tmp_path: Path, pipeline: EditPipeline
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    (folder / "Qwen" / "model.safetensors").unlink()
    expected = pipeline.conditioner.vlm.state_dict()
    write_conditioner(folder / "Qwen", expected)

    checkpoint = read(folder, pipeline)

    assert same(checkpoint.pipeline.conditioner.vlm.state_dict(), expected)
    assert checkpoint.name == "Step1X-Edit v1.1 (conditioner GGUF F32)"


def test_the_language_head_of_v1_2_is_read_too(tmp_path: Path) -> None:
    pipeline = tiny_pipeline_v1_2()
    write_official(tmp_path / "model", pipeline)
    (tmp_path / "model" / "Qwen" / "model.safetensors").unlink()
    expected = pipeline.conditioner.vlm.state_dict()
    write_conditioner(tmp_path / "model" / "Qwen", expected)

    wanted = Wanted(dtype=torch.float32, releases=tiny_releases_v1_2(pipeline))
    found = read_checkpoint(tmp_path / "model", wanted).pipeline.conditioner.vlm.state_dict()

    assert same(found, expected)


def without_vision(folder: Path) -> None:
    (folder / "mmproj-F32.gguf").unlink()


def of_another_architecture(folder: Path) -> None:
    write_gguf(folder / "Qwen-Q8_0.gguf", {"token_embd.weight": torch.ones(4, 4)}, F32, "llama")


def of_the_model_before(folder: Path) -> None:
    writer = GGUFWriter(folder / "Qwen-Q8_0.gguf", "qwen2vl")
    writer.add_name("Qwen2 VL 7B Instruct")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    finish(writer)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_vision, "the conditioner lacks its vision tower: add its GGUF named mmproj"),
        (of_another_architecture, "Qwen-Q8_0.gguf is a GGUF of llama, the conditioner is Qwen2.5"),
        (of_the_model_before, "Qwen-Q8_0.gguf is a GGUF of Qwen2-VL, the conditioner is Qwen2.5-"),
    ],
)
def test_another_model_is_no_conditioner(
    original: Path,
    tmp_path: Path,
    pipeline: EditPipeline,
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    (folder / "Qwen" / "model.safetensors").unlink()
    write_conditioner(folder / "Qwen", pipeline.conditioner.vlm.state_dict())
    damage(folder / "Qwen")

    with pytest.raises(CheckpointError, match=sentence):
        read(folder, pipeline)


# --- damage --------------------------------------------------------------------------------------

BIAS = "img_in.bias"


def cut_to(size: int) -> Callable[[Path, Tensors], None]:
    def damage(file: Path, tensors: Tensors) -> None:
        write_gguf(file, tensors)
        file.write_bytes(file.read_bytes()[:size])

    return damage


def with_bytes(at: int, replaced: bytes) -> Callable[[Path, Tensors], None]:
    def damage(file: Path, tensors: Tensors) -> None:
        write_gguf(file, tensors)
        whole = bytearray(file.read_bytes())
        whole[at : at + len(replaced)] = replaced
        file.write_bytes(whole)

    return damage


def with_a_tensor(number: int, side: int, offset: int) -> Callable[[Path, Tensors], None]:
    """A file of one tensor that is described by these numbers."""

    def damage(file: Path, tensors: Tensors) -> None:
        name = b"some.weight"
        header = struct.pack("<IQQ", 3, 1, 0)
        described = struct.pack("<IQIQ", 1, side, number, offset)
        file.write_bytes(b"GGUF" + header + struct.pack("<Q", len(name)) + name + described)

    return damage


def big_endian(file: Path, tensors: Tensors) -> None:
    writer = GGUFWriter(file, "flux", endianess=GGUFEndian.BIG)
    writer.add_tensor("some", np.ones(3, dtype=np.float32))
    finish(writer)


def split(file: Path, tensors: Tensors) -> None:
    writer = GGUFWriter(file, "flux")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("some", np.ones(3, dtype=np.float32))
    finish(writer)


def of_a_shape(file: Path, tensors: Tensors) -> None:
    write_gguf(file, {**tensors, BIAS: torch.ones(3)})


def not_finite(file: Path, tensors: Tensors) -> None:
    write_gguf(file, {**tensors, BIAS: tensors[BIAS] * torch.inf})


def of_integers(file: Path, tensors: Tensors) -> None:
    writer = GGUFWriter(file, "flux")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().numpy().astype("i1" if name == BIAS else "f4"))
    finish(writer)


def of(architecture: str, name: str) -> Callable[[Path, Tensors], None]:
    return lambda file, _: write_gguf(file, {name: torch.ones(4, 4)}, F32, architecture)


LONG = struct.pack("<Q", 2**62)
FIRST_NAME = 24  # behind magic, version and two counts
REFUSED: dict[str, tuple[Callable[[Path, Tensors], None], str]] = {
    "empty": (cut_to(0), "it is empty"),
    "cut off in its header": (cut_to(1000), "it ends within its header; download it again"),
    "cut off in its data": (cut_to(100_000), "does; download it again"),
    "not GGUF": (with_bytes(0, b"PK"), "it is not in GGUF"),
    "version 1": (with_bytes(4, b"\1"), "it has version 1 of GGUF; versions 2 and 3 are supported"),
    "big-endian": (big_endian, "its numbers are big-endian, which is not supported; convert it"),
    "endless fields": (with_bytes(16, LONG), "it ends within its header"),
    "an endless name": (with_bytes(FIRST_NAME, LONG), "it ends within its header"),
    "a part": (split, "it is one of 2 parts: join them with llama-gguf-split --merge"),
    "a tensor beyond the end": (with_a_tensor(0, 8, 1 << 40), "it ends before its tensor some.wei"),
    "an endless tensor": (with_a_tensor(0, 1 << 60, 0), "it ends before its tensor some.weight"),
    "rows of half a block": (with_a_tensor(12, 128, 0), "the shape (128,), and Q4_K packs 256"),
    "an unknown type": (with_a_tensor(99, 32, 0), "its numbers of the type 99 are not known"),
    "a type for products": (
        with_a_tensor(15, 256, 0),
        "numbers of the type Q8_K are not supported",
    ),
    "integers": (of_integers, f"has {BIAS} as integers, whose scale is unknown"),
    "not finite": (not_finite, f"holds numbers in transformer.{BIAS} that are not finite"),
    "of another shape": (of_a_shape, f"the transformer has {BIAS} of shape (3,) instead of"),
    "FLUX": (
        of("flux", "double_blocks.0.img_attn.qkv.weight"),
        "model.gguf has no connector: it is another model of this kind, such as FLUX",
    ),
    "Wan": (of("wan", "blocks.0.cross_attn.k.weight"), "model.gguf is a GGUF of wan"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_damage_and_other_models_are_refused_in_one_sentence(
    folder: Path, pipeline: EditPipeline, tensors: Tensors, problem: str
) -> None:
    damage, sentence = REFUSED[problem]
    damage(folder / "model.gguf", tensors)

    with pytest.raises(CheckpointError) as refused:
        read(folder / "model.gguf", pipeline)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rare_formats_need_the_package_and_common_ones_do_not(
    folder: Path,
    pipeline: EditPipeline,
    tensors: Tensors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common, rare = folder / "common.gguf", folder.parent / "rare.gguf"
    write_gguf(common, tensors, Q8_0)
    write_gguf(rare, tensors, Kind.MXFP4)
    monkeypatch.setitem(sys.modules, "gguf", None)

    assert read(common, pipeline).name == "Step1X-Edit v1.1 (GGUF Q8_0)"
    with pytest.raises(CheckpointError, match=r"of the type 39 install step1x-edit\[gguf\]$"):
        read(rare, pipeline)


def test_a_lora_in_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hand\.gguf: a LoRA in GGUF is not supported; use"):
        read_lora(tmp_path / "hand.gguf", {}, [])


# --- an edit -------------------------------------------------------------------------------------


def test_an_edit_from_gguf_equals_that_from_safetensors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_published(model, narrow_pipeline(1, 1, vae_sizes=VAE))
    shards = sorted((model / "transformer").glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    photo = io.BytesIO()
    Image.fromarray(a_picture(48, 48)).save(photo, "png")
    given = {"model_path": model, "device": "cpu", "allowed_dirs": (tmp_path,)}
    service = build_service(Settings(_env_file=None, **given))  # type: ignore[arg-type]
    form = {"prompt": "night", "num_steps": 10, "size_level": 512, "guidance_scale": 1, "seed": 1}

    with contextlib.closing(service), calling(service) as client:

        def edited() -> tuple[Bytes, str]:
            """The pixels, and the precision in the status."""
            client.post("/api/gpu/release")
            answer = client.post(
                "/api/edit",
                files={"file": photo.getvalue()},
                data=form,
                headers={"Accept": "application/json"},
            )
            assert answer.status_code == 200, answer.text
            picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["image_base64"])))
            status = client.get("/api/gpu/status").json()["gpu_status"]
            return np.asarray(picture.convert("RGB")), status["plan"]["precision"]

        exact, _ = edited()
        for file in (model / "transformer").glob("*.safetensors*"):
            file.unlink()
        file = model / "transformer" / "model.gguf"
        write_gguf(file, tensors, BF16)
        lossless, precision = edited()
        write_gguf(file, tensors, Q8_0)
        packed, packed_precision = edited()

    assert np.array_equal(lossless, exact)
    assert precision == "bf16 from GGUF BF16"
    assert packed_precision == "bf16 from GGUF Q8_0"
    assert 45 < psnr(packed, exact) < math.inf


def psnr(a: Bytes, b: Bytes) -> float:
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf
