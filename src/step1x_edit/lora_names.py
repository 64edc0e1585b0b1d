"""The names of LoRAs, which are all that callers see of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PEFT_STEM: Final = "adapter_model"
"""Every file that peft writes has this name, each in its own folder."""


def lora_name(path: Path) -> str:
    """The name of a LoRA: that of its file, or of its folder if peft wrote it."""
    return path.parent.name if path.stem == PEFT_STEM and path.parent.name else path.stem


def shown_file(path: Path) -> str:
    """The file of a LoRA in messages: with its folder if that is its name."""
    return path.name if path.stem == lora_name(path) else f"{path.parent.name}/{path.name}"
