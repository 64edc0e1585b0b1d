"""A node for ComfyUI: edits pictures by saying what to change, on a server of step1x-edit.

Copy this file into ComfyUI's `custom_nodes`. It needs nothing that ComfyUI does not have. The node
is in *image*. The server is at STEP1X_EDIT_URL, or at http://localhost:8000. Its key, if it has
one, is taken from STEP1X_EDIT_API_KEY, so that it is not saved in workflows.
"""

from __future__ import annotations

import io
import json
import os
import urllib.error
import urllib.request
import uuid

import numpy as np
import torch
from PIL import Image

TIMEOUT_S = 3600


class Step1XEdit:
    """Each picture of the batch is edited with the same prompt; white in the mask may change."""

    CATEGORY = "image"
    DESCRIPTION = "Edits pictures by saying what to change, on a server of step1x-edit."
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
                "num_steps": ("INT", {"default": 28, "min": 10, "max": 50}),
                "guidance_scale": ("FLOAT", {"default": 6.0, "min": 1.0, "max": 15.0, "step": 0.5}),
                "mode": (["exact", "fast", "turbo"],),
            },
            "optional": {
                "mask": ("MASK",),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
            },
        }

    def edit(
        self, image, prompt, seed, num_steps, guidance_scale, mode, mask=None, negative_prompt=""
    ):
        fields = {
            "prompt": prompt,
            "seed": seed,
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "mode": mode,
        }
        if negative_prompt:
            fields["negative_prompt"] = negative_prompt
        results = []
        for index, picture in enumerate(image):
            files = {"file": png(picture)}
            if mask is not None:
                files["mask"] = png(mask[index % len(mask)])
            results.append(pixels(post("/api/edit", fields, files)))
        return (torch.stack(results),)


def png(values):
    """A PNG of floats between 0 and 1, of shape (height, width, 3) or (height, width)."""
    levels = (values.cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def pixels(content):
    """The pixels of a picture as floats between 0 and 1, of shape (height, width, 3)."""
    with Image.open(io.BytesIO(content)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")).astype(np.float32) / 255)


def post(path, fields, files):
    """The body of the server's answer to a form; raises RuntimeError with the server's sentence."""
    boundary = uuid.uuid4().hex
    body = io.BytesIO()
    for name, value in fields.items():
        body.write(f"--{boundary}\r\nContent-Disposition: form-data; ".encode())
        body.write(f'name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, content in files.items():
        body.write(f"--{boundary}\r\nContent-Disposition: form-data; ".encode())
        body.write(f'name="{name}"; filename="{name}.png"\r\n'.encode())
        body.write(b"Content-Type: image/png\r\n\r\n" + content + b"\r\n")
    body.write(f"--{boundary}--\r\n".encode())
    url = os.environ.get("STEP1X_EDIT_URL", "http://localhost:8000").rstrip("/") + path
    request = urllib.request.Request(url, body.getvalue())
    request.add_header("Content-Type", f"multipart/form-data; boundary={boundary}")
    if key := os.environ.get("STEP1X_EDIT_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(sentence(error)) from None
    except OSError as error:
        raise RuntimeError(f"No step1x-edit answers at {url}: {error}") from None


def sentence(error):
    """What the server says about a request that failed."""
    try:
        return json.load(error)["detail"]
    except (ValueError, KeyError):
        return f"The server answered {error.code}"


NODE_CLASS_MAPPINGS = {"Step1XEdit": Step1XEdit}
NODE_DISPLAY_NAME_MAPPINGS = {"Step1XEdit": "Edit by Instruction (Step1X-Edit)"}
