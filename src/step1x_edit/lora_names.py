"""The names of LoRAs, which are all that callers see of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PEFT_STEM: Final = "adapter_model"
"""Every file that peft writes has this name, each in its own folder."""

_BY_FOLDER: Final = (PEFT_STEM, "pytorch_lora_weights")
"""Names that say nothing; the second one is that of diffusers."""

LORA_SUFFIXES: Final = (".safetensors", ".sft")


def lora_name(path: Path) -> str:
    """The name of a LoRA: that of its file, or of its folder if peft or diffusers wrote it."""
    return path.parent.name if path.stem in _BY_FOLDER and path.parent.name else path.stem


def shown_file(path: Path) -> str:
    """The file of a LoRA in messages: with its folder if that is its name."""
    return path.name if path.stem == lora_name(path) else f"{path.parent.name}/{path.name}"
