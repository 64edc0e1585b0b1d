"""What the operator decides: read from flags, environment and `.env`, in this order.

This is the only reader of the environment. Every name is also the name of the variable, in upper
case. A value that cannot be right stops the start; whether a checkpoint lies at `MODEL_PATH` is
the state of a disk and not a setting, so it is told to whoever asks for an edit.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal

import platformdirs
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from step1x_edit.errors import SettingsError
from step1x_edit.schemas import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_NUM_STEPS,
    DEFAULT_SIZE_LEVEL,
    MAX_STRENGTH,
    GuidanceScale,
    NumSteps,
    Parameter,
    Precision,
    SizeLevel,
    complaints,
    parameters_of,
)

MEGA: Final = 1_000_000
MEBI: Final = 1024 * 1024


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.strip().upper() if isinstance(value, str) else value


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise PydanticCustomError(
            "plain_text", "must be auto, cpu, cuda or cuda:N, got '{value}'", {"value": value}
        )
    return value


def _plain_key(value: SecretStr) -> SecretStr:
    # What every client can send in a header as it is; the key itself is never part of a message.
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise PydanticCustomError(
            "plain_text", "must consist of ASCII letters, digits and signs, without spaces"
        )
    return value


def _loras(value: object) -> object:
    """What `hand.safetensors@0.8:other.safetensors` says: files, or folders, and their strengths.

    What a folder holds is there to be asked for, and is not added unless that is said.
    """
    if not isinstance(value, str):
        return value
    found: dict[Path, float] = {}
    for part in filter(None, map(str.strip, value.split(os.pathsep))):
        file, mark, strength = part.rpartition("@")
        if not mark or strength.endswith(".safetensors") or os.sep in strength:
            file, strength = part, ""  # the sign belongs to the name
        path = Path(file).expanduser()
        if file == part:
            strength = "0" if path.is_dir() else "1"
        try:
            found[path] = float(strength)
        except ValueError:
            found[path] = math.nan
        if not abs(found[path]) <= MAX_STRENGTH:
            raise PydanticCustomError(
                "plain_text",
                "wants a strength between -{most} and {most} after '@', got '{part}'",
                {"most": MAX_STRENGTH, "part": part},
            )
    return found


def _lora_files(paths: dict[Path, float]) -> dict[Path, float]:
    """The files, also those in folders: one that is named itself has the strength said there."""
    found: dict[Path, float] = {}
    for path, strength in paths.items():
        if not path.is_dir():
            found[path] = strength
            continue
        for file in sorted(path.glob("*.safetensors")):
            if file.stem.isprintable() and not file.name.startswith("."):
                found.setdefault(file, paths.get(file, strength))
    by_name: dict[str, Path] = {}
    for file in found:
        other = by_name.setdefault(file.stem, file)
        if other != file:
            raise PydanticCustomError(
                "plain_text",
                "has two files of the name {name}, {one} and {other}; rename one",
                {"name": file.stem, "one": str(other), "other": str(file)},
            )
    return found


def _plain_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", value):
            raise PydanticCustomError(
                "plain_text", "holds {value}, which is not the name of a host", {"value": value}
            )
    return values


def _plain_origins(values: tuple[str, ...]) -> tuple[str, ...]:
    # Each by its name: '*' would let pages of anybody use the browser of somebody who is let in.
    for value in values:
        if not re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?", value):
            raise PydanticCustomError(
                "plain_text",
                "holds {value}, which is not an origin such as https://app.example",
                {"value": value},
            )
    return values


def local_folders() -> tuple[Path, ...]:
    """Where callers on this machine may read and write by default: home, here, temp.

    Services and containers often start in `/` or have it as their home: such a root is left out,
    because it would open the whole machine. A home that nobody knows is left out as well.
    """
    folders = [Path.cwd()]
    with contextlib.suppress(RuntimeError):
        folders.insert(0, Path.home())
    narrow = [folder for folder in folders if folder != Path(folder.anchor)]
    return (*narrow, Path(tempfile.gettempdir()))


def start_folder() -> tuple[Path, ...]:
    """Where callers over HTTP may read and write by default: here, unless that is a whole disk."""
    folder = Path.cwd()
    return () if folder == Path(folder.anchor) else (folder,)


def _data_folder() -> Path:
    return platformdirs.user_data_path("step1x-edit", appauthor=False)


def inherited_environment(**changes: str) -> dict[str, str]:
    """The environment for a process that we start: our own, with some changes."""
    return {**os.environ, **changes}


def keep_gradio_quiet(folder: Path) -> None:
    """Have Gradio keep its files in `folder` and call nobody; it takes no arguments for these."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


class Settings(BaseSettings):
    """All settings of the server and the command line, checked."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",  # the environment and .env hold the names of other programs as well
        frozen=True,
    )

    model_path: Annotated[
        Path | None, Field(description="Checkpoint to load; unset: the embedded demo checkpoint")
    ] = None
    model_version: Annotated[
        Literal["auto", "demo", "v1.0", "v1.1", "v1.2"],
        Field(description="Version that the checkpoint must have; auto: recognise it"),
        BeforeValidator(_lower),
    ] = "auto"
    lora_path: Annotated[
        dict[Path, float],
        NoDecode,
        AfterValidator(_lora_files),
        BeforeValidator(_loras),
        Field(
            default_factory=dict,
            description=f"LoRA files that change the model, separated by '{os.pathsep}'; "
            "file@0.8 adds that much of it. Those in a folder are there to be asked for by edits",
        ),
    ]
    gpu_idle_timeout: Annotated[
        int, Field(ge=0, description="Seconds without use until the model leaves the GPU; 0: never")
    ] = 60
    gpu_release_timeout: Annotated[
        int, Field(ge=0, description="Seconds without use until nothing is left of it; 0: never")
    ] = 0
    device: Annotated[
        str,
        Field(description="Where to compute: auto, cpu, cuda or cuda:N"),
        AfterValidator(_known_device),
        BeforeValidator(_lower),
    ] = "auto"
    precision: Annotated[
        Precision,
        Field(
            description="How weights are kept: bf16, or most of them as fp8, int8 or nf4, which "
            "takes a half or a third of the memory and changes pictures a little; auto: exact"
        ),
        BeforeValidator(_lower),
    ] = "auto"
    allowed_dirs: Annotated[
        tuple[Path, ...],
        NoDecode,
        Field(
            default_factory=local_folders,
            description=f"Folders to read and write in, separated by '{os.pathsep}'; "
            "unset: home, start folder, temp folder; for a server over HTTP the start folder",
        ),
    ]
    host: Annotated[
        str,
        Field(
            min_length=1,
            description="Address to listen at; one that other machines reach needs API_KEY",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen at; 0: a free one")] = (
        8000
    )
    enable_api: Annotated[bool, Field(description="Whether there are REST routes")] = True
    enable_mcp: Annotated[bool, Field(description="Whether there is MCP over HTTP")] = True
    mcp_max_wait: Annotated[
        int,
        Field(
            ge=0,
            description="Seconds until edit_image answers with a job_id while the edit goes on, "
            "for MCP clients that give up; 0: never",
        ),
    ] = 0
    enable_ui: Annotated[bool, Field(description="Whether there is a web page")] = True
    api_key: Annotated[
        Annotated[SecretStr, AfterValidator(_plain_key)] | None,
        Field(description="What callers over HTTP have to show as a bearer token; unset: nothing"),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Further names of this server, such as a proxy's, separated by ','"),
        AfterValidator(_plain_names),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Sites whose pages may call this server, such as https://app.example, "
            "separated by ','; unset: none but its own"
        ),
        AfterValidator(_plain_origins),
    ] = ()
    rate_limit: Annotated[
        int,
        Field(
            ge=0,
            description="Requests a minute that start work, for each caller: whoever has the key, "
            "or an address where there is none; a third of them at once, at most 20; 0: any number",
        ),
    ] = 60
    max_queue: Annotated[int, Field(ge=1, description="Edits that may wait")] = 32
    max_upload_mb: Annotated[int, Field(ge=1, description="Largest input file in MiB")] = 32
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Connections at a time; another machine may have an eighth of them. Above "
            "that the one that has kept the server waiting longest is closed for the new one",
        ),
    ] = 256
    receive_timeout: Annotated[
        int,
        Field(
            ge=1,
            description="Seconds that the body of a request may take to arrive; 10 of them for its "
            "head, or until a body comes at 16 KiB a second",
        ),
    ] = 60
    # Pillow itself refuses pictures of twice its own limit, 178 megapixels.
    max_megapixels: Annotated[
        int, Field(ge=1, le=178, description="Largest input picture in millions of pixels")
    ] = 50
    edit_timeout: Annotated[int, Field(ge=1, description="Seconds that one edit may take")] = 900
    data_dir: Annotated[
        Path,
        Field(
            default_factory=_data_folder,
            description="Folder for our own files: stored jobs, and the note by which a running "
            "server is found; unset: the user's data folder",
        ),
    ]
    jobs_max_mb: Annotated[
        int, Field(ge=1, description="MiB that stored jobs may occupy; the oldest give way")
    ] = 2048
    jobs_max_age: Annotated[
        int, Field(ge=1, description="Seconds until a stored job that has ended is forgotten")
    ] = 7 * 86400
    default_num_steps: NumSteps = DEFAULT_NUM_STEPS
    default_guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    default_size_level: SizeLevel = DEFAULT_SIZE_LEVEL
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        Field(description="What is worth a line in the log"),
        BeforeValidator(_upper),
    ] = "INFO"
    log_format: Annotated[
        Literal["text", "json"],
        Field(description="Lines for people, or one JSON object in each for programs"),
        BeforeValidator(_lower),
    ] = "text"

    @property
    def max_pixels(self) -> int:
        """Largest input picture in pixels."""
        return self.max_megapixels * MEGA

    @property
    def max_bytes(self) -> int:
        """Largest input file in bytes."""
        return self.max_upload_mb * MEBI

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: nobody knows where it leads, and when
            return False

    @field_validator("model_path", "data_dir", mode="after")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip().lower() for part in value.split(",") if part.strip())

    @field_validator("allowed_dirs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except ValueError:
                raise PydanticCustomError("plain_text", "is not a list") from None
        return [part for part in value.split(os.pathsep) if part.strip()]

    @field_validator("allowed_dirs", mode="after")
    @classmethod
    def _folders(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        folders = tuple(path.expanduser().resolve() for path in paths)
        for folder in folders:
            if not folder.is_dir():
                raise PydanticCustomError(
                    "plain_text", "holds {folder}, which is not a folder", {"folder": str(folder)}
                )
        return folders


_NAMES: Final[Mapping[str, Parameter]] = {
    name: replace(parameter, name=name.upper())
    for name, parameter in parameters_of(Settings).items()
}


def load_settings(overrides: Mapping[str, object] | None = None) -> Settings:
    """Read the settings; `overrides` (flags, by field name) win, those that are None are left out.

    Raises SettingsError with everything that is wrong in one sentence.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    if unknown := given.keys() - Settings.model_fields.keys():
        raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError("; ".join(complaints(error, _NAMES))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read ({type(error).__name__})") from None


def load_server_settings(overrides: Mapping[str, object] | None = None) -> Settings:
    """Read the settings for a server over HTTP: it opens less, and must not stand open itself."""
    settings = load_settings(overrides)
    if not settings.is_loopback and settings.api_key is None:
        raise SettingsError(
            f"HOST {settings.host} can be reached from other machines, so set API_KEY as well, "
            "or HOST to 127.0.0.1"
        )
    if "allowed_dirs" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"allowed_dirs": start_folder()})
