"""The quality of the demo checkpoint, on photographs that it was never trained on.

    python benchmarks/bench_demo.py [--size-level 512] [--edits bw,sepia] [--arithmetic bf16]
                                    [--contact-sheet FOLDER]

Every edit is requested in words and compared with its classical form: the exact edit of the same
picture, and that exact edit passed through the autoencoder, which is the best possible output of
this model. The blind check finds which of all classical edits of the picture is closest to the
output. With `--arithmetic bf16` each output is also compared with that of float32. Prints tables,
then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import demo_prompts
from demo_data import CORE_EDITS, EDITS, HELD_OUT_PHOTOS, Picture, load_photo
from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.sizes import fit_size

PROMPTS = {
    "bw": "turn it into a black and white photo",
    "sepia": "give it a sepia tone like a vintage photograph",
    "invert": "invert the colors",
    "bright": "make the picture brighter",
    "dark": "把图片调暗",
    "night": "change to night scene",
    "warm": "warm sunset light",
    "cool": "make it look like a cold winter day",
    "contrast": "increase the contrast",
    "vivid": "色を鮮やかにして",
    "faded": "make the colors faded and washed out",
    "fog": "add thick fog",
    "red": "give it a red tint",
    "green": "tint the image green",
    "blue": "a blue tint please",
    "pink": "apply a pink tint",
    "purple": "加上紫色色調",
    "swap": "swap the red and blue channels",
    "autumn": "make it look like autumn",
    "blur": "blur the image",
    "sketch": "turn it into a pencil sketch",
    "thermal": "thermal camera view",
    "cyberpunk": "cyberpunk neon style",
    "stencil": "make it a stencil",
    "mosaic": "pixelate it into a mosaic",
    "painting": "变成一幅油画",
}


def psnr(a: Picture, b: Picture) -> float:
    return float(-10 * np.log10(((a - b) ** 2).mean() + 1e-10))


def ssim(a: Picture, b: Picture) -> float:
    return float(structural_similarity(a, b, channel_axis=2, data_range=1.0))


def fitted(photo: Picture, pipeline: EditPipeline, level: int) -> np.ndarray:
    """The photograph as 8-bit pixels at the working size of the model."""
    size = fit_size(photo.shape[1], photo.shape[0], level, pipeline.config.size_multiple)
    image = Image.fromarray((photo * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def run_edit(pipeline: EditPipeline, request: NetworkRequest) -> Picture:
    *_, edited = pipeline.edit(request)
    assert isinstance(edited, Edited)
    return edited.image.astype(np.float32) / 255


@torch.inference_mode()
def through_autoencoder(pipeline: EditPipeline, picture: Picture) -> Picture:
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1
    out = pipeline.vae.decode(pipeline.vae.encode(tensor.to(pipeline.vae.dtype)))[0].float()
    return ((out.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a demo folder; default: the embedded one")
    parser.add_argument("--size-level", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--guidance-scale", type=float, default=6.0)
    parser.add_argument("--edits", default=",".join(EDITS))
    parser.add_argument("--photos", default=",".join(HELD_OUT_PHOTOS))
    parser.add_argument("--arithmetic", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--contact-sheet",
        type=Path,
        help="folder for one picture per photograph: exact over edited",
    )
    arguments = parser.parse_args()
    wide = read_checkpoint(arguments.checkpoint).pipeline
    pipeline = wide
    if arguments.arithmetic == "bf16":
        narrow = Wanted(dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
        pipeline = read_checkpoint(arguments.checkpoint, narrow).pipeline
    names, photos = arguments.edits.split(","), arguments.photos.split(",")
    started = time.monotonic()

    autoencoder: dict[int, dict[str, float]] = {}
    for level in (512, 1024):
        autoencoder[level] = {}
        for photo in photos:
            picture = (
                fitted(load_photo(*HELD_OUT_PHOTOS[photo]), pipeline, level).astype(np.float32)
                / 255
            )
            autoencoder[level][photo] = psnr(through_autoencoder(pipeline, picture), picture)
    print(f"Autoencoder, PSNR in dB ({', '.join(photos)}):")
    for level, values in autoencoder.items():
        each = " / ".join(f"{value:.1f}" for value in values.values())
        print(f"  {level}: mean {np.mean(list(values.values())):.2f} ({each})")

    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("identity", *names)}
    hits: list[tuple[str, str, str]] = []
    from_wide: list[float] = []
    for photo in photos:
        image = fitted(load_photo(*HELD_OUT_PHOTOS[photo]), pipeline, arguments.size_level)
        picture = image.astype(np.float32) / 255
        exact = {name: edit(picture) for name, edit in EDITS.items()}
        sheet = []
        for name in rows:
            prompt = "" if name == "identity" else PROMPTS[name]
            request = NetworkRequest(
                image,
                prompt,
                num_steps=arguments.num_steps,
                guidance_scale=arguments.guidance_scale,
                size_level=arguments.size_level,
                seed=0,
            )
            output = run_edit(pipeline, request)
            if pipeline is not wide:
                from_wide.append(psnr(output, run_edit(wide, request)))
            wanted = picture if name == "identity" else exact[name]
            bound = through_autoencoder(pipeline, wanted)
            rows[name].append(
                {
                    "no edit": psnr(picture, wanted),
                    "autoencoder": psnr(bound, wanted),
                    "exact": psnr(output, wanted),
                    "bound": psnr(output, bound),
                    "ssim autoencoder": ssim(bound, wanted),
                    "ssim": ssim(output, wanted),
                    "ssim bound": ssim(output, bound),
                }
            )
            if name != "identity":
                nearest = max(exact, key=lambda other: psnr(output, exact[other]))
                hits.append((photo, name, nearest))
            sheet.append(np.concatenate([wanted, output], 0))
        if arguments.contact_sheet:
            save_sheet(arguments.contact_sheet / f"{photo}_{arguments.size_level}.png", sheet)

    mean = {
        name: {key: float(np.mean([v[key] for v in values])) for key in values[0]}
        for name, values in rows.items()
    }
    print(
        f"\nEdits at {arguments.size_level}, {arguments.num_steps} steps, guidance "
        f"{arguments.guidance_scale}; mean of {len(photos)} photographs, PSNR in dB and SSIM.\n"
        "AE: the exact edit passed through the autoencoder.\n"
    )
    print_table(mean)
    core = [mean[name] for name in names if name in CORE_EDITS]
    right = [name == nearest for _, name, nearest in hits]
    summary = {
        "autoencoder_512_db": float(np.mean(list(autoencoder[512].values()))),
        "autoencoder_1024_db": float(np.mean(list(autoencoder[1024].values()))),
        "core_mean_to_autoencoder_db": float(np.mean([m["bound"] for m in core])) if core else None,
        "core_worst_to_autoencoder_db": min((m["bound"] for m in core), default=None),
        "core_mean_to_exact_db": float(np.mean([m["exact"] for m in core])) if core else None,
        "identity_ssim": mean["identity"]["ssim"],
        "identity_ssim_to_autoencoder": mean["identity"]["ssim bound"],
        "blind_check": float(np.mean(right)) if right else None,
        "from_float32_mean_db": float(np.mean(from_wide)) if from_wide else None,
        "from_float32_worst_db": min(from_wide, default=None),
        "recogniser_held_out_words": recogniser_accuracy(pipeline),
        "size_level": arguments.size_level,
        "num_steps": arguments.num_steps,
        "guidance_scale": arguments.guidance_scale,
        "seconds": round(time.monotonic() - started),
    }
    for photo, name, nearest in hits:
        if name != nearest:
            print(f"blind check: {name} of {photo} looks like {nearest}")
    print(json.dumps(summary))


def print_table(mean: dict[str, dict[str, float]]) -> None:
    columns = ["no edit", "AE to exact", "output to exact", "output to AE"]
    ssims = ["SSIM AE to exact", "SSIM output to exact", "SSIM output to AE"]
    print("| edit | prompt | " + " | ".join(columns + ssims) + " |")
    print("| --- | --- |" + " --- |" * len(columns + ssims))
    for name, m in mean.items():
        before = "–" if name == "identity" else f"{m['no edit']:.1f}"
        cells = [before, f"{m['autoencoder']:.1f}", f"{m['exact']:.1f}", f"**{m['bound']:.1f}**"]
        cells += [f"{m[key]:.2f}" for key in ("ssim autoencoder", "ssim", "ssim bound")]
        print(f"| {name} | {PROMPTS.get(name, '(empty)')} | " + " | ".join(cells) + " |")


@torch.inference_mode()
def recogniser_accuracy(pipeline: EditPipeline, per_label: int = 20) -> dict[str, float]:
    """Share of prompts with a word absent from training whose edit is recognised correctly."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    pairs = demo_prompts.evaluation_set(per_label, seed=1)
    found = [pipeline.recognise(prompt, grey) for prompt, _ in pairs]
    right = [a == label for a, (_, label) in zip(found, pairs, strict=True)]
    unknown = [
        a == "unknown" for a, (_, label) in zip(found, pairs, strict=True) if label == "unknown"
    ]
    return {
        "accuracy": float(np.mean(right)),
        "unknown_recall": float(np.mean(unknown)),
        "prompts": len(pairs),
    }


def save_sheet(path: Path, tiles: list[Picture], columns: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blank = np.ones_like(tiles[0])
    tiles = tiles + [blank] * (-len(tiles) % columns)
    grid = np.concatenate(
        [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)], 0
    )
    image = Image.fromarray((grid * 255 + 0.5).astype(np.uint8))
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(path)


if __name__ == "__main__":
    main()
