"""The settings: read from flags, environment and `.env`, in this order.

Only this module reads the environment. Every field has the name of its variable, in lower case.
An invalid value prevents the start. Whether `MODEL_PATH` holds a checkpoint is the state of a disk
and not a setting, so that error is reported by the edit that needs it.

Blanks, line ends and one pair of quotes around a value are removed: shells do that,
but `docker --env-file` and secret files do not. A key in quotes is refused instead, because other
programs that read the same file would send the quotes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import platformdirs
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from typing_extensions import Self

from step1x_edit import foreign_json
from step1x_edit.errors import SettingsError, Step1XEditError
from step1x_edit.lora_names import LORA_SUFFIXES, lora_name, shown_file
from step1x_edit.schemas.complaints import complaints
from step1x_edit.schemas.parameters import Parameter, parameters_of
from step1x_edit.schemas.requests import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_MODE,
    DEFAULT_NUM_STEPS,
    DEFAULT_SIZE_LEVEL,
    MAX_STRENGTH,
    Arithmetic,
    GuidanceScale,
    ModeOfWork,
    NumSteps,
    Precision,
    SizeLevel,
)

log = logging.getLogger(__name__)

_PACKAGE: Final = Path(__file__).parent
MEGA: Final = 1_000_000
MEBI: Final = 1024 * 1024
MOST: Final = 10**9
"""The largest number that a setting accepts: 31 years in seconds, a petabyte in MiB."""

_ENV_FILE: Final = ".env"
_NO_FOLDER: Final = Path(os.devnull) / "step1x-edit"
"""The data folder of a user without a home: nothing can ever be written there."""


def _bare(value: str) -> str:
    """Remove blanks, line ends and quotes around a value."""
    value = value.strip()
    quote = value[:1]
    if len(value) > 1 and quote in "'\"" and value.endswith(quote) and quote not in value[1:-1]:
        return value[1:-1].strip()
    return value


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.strip().upper() if isinstance(value, str) else value


GPUS_PER_EDIT: Final = (1, 2, 3, 4, 6, 8, 12, 16)
"""Each prompt gets a half of them; an odd number is for both. That number must divide 24 heads."""


def _possible_number(value: int) -> int:
    if value not in GPUS_PER_EDIT:
        possible = ", ".join(map(str, GPUS_PER_EDIT))
        raise PydanticCustomError(
            "plain_text",
            "must be one of {possible}, because 24 heads are divided among them; got {value}",
            {"possible": possible, "value": value},
        )
    if value > 1 and sys.platform != "linux":
        raise PydanticCustomError("plain_text", "must be 1 except on Linux")
    return value


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise PydanticCustomError(
            "plain_text", "must be auto, cpu, cuda or cuda:N, got '{value}'", {"value": value}
        )
    return value


def _plain_key(value: SecretStr) -> SecretStr:
    # A key that every client can send in a header unchanged; messages never contain the key.
    key = value.get_secret_value()
    if len(key) > 1 and key[0] in "'\"" and key.endswith(key[0]):
        raise PydanticCustomError(
            "plain_text", "must not be in quotes: they would be part of the key"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise PydanticCustomError(
            "plain_text", "must consist of ASCII letters, digits and punctuation, without spaces"
        )
    return value


def _loras(value: object) -> object:
    """Parse `hand.safetensors@0.8:other.safetensors` into files or folders and their strengths.

    The files of a folder are available to edits; they are only added if it has a strength.
    """
    if not isinstance(value, str):
        return value
    found: dict[Path, float] = {}
    for part in filter(None, map(_bare, value.split(os.pathsep))):
        file, mark, strength = part.rpartition("@")
        if not mark or strength.endswith(LORA_SUFFIXES) or os.sep in strength:
            file, strength = part, ""  # the '@' belongs to the name
        path = _without_tilde(Path(_bare(file)))
        if file == part:
            strength = "0" if path.is_dir() else "1"
        try:
            found[path] = float(strength)
        except ValueError:
            found[path] = math.nan
        if not abs(found[path]) <= MAX_STRENGTH:
            raise PydanticCustomError(
                "plain_text",
                "needs a strength between -{most} and {most} after '@', got '{part}'",
                {"most": MAX_STRENGTH, "part": part},
            )
    return found


def _model_file(value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() not in (".safetensors", ".pth"):
        raise PydanticCustomError(
            "plain_text", "must be a .safetensors or .pth file, got '{file}'", {"file": value.name}
        )
    return value


def _lora_files(paths: dict[Path, float]) -> dict[Path, float]:
    """All files, including those of folders; a strength given for a file itself wins."""
    found: dict[Path, float] = {}
    for path, strength in paths.items():
        if not path.is_dir():
            found[path] = strength
            continue
        for file in sorted(each for each in path.glob("*") if each.suffix in LORA_SUFFIXES):
            if lora_name(file).isprintable() and not file.name.startswith("."):
                found.setdefault(file, paths.get(file, strength))
    by_name: dict[str, Path] = {}
    for file in found:
        other = by_name.setdefault(lora_name(file), file)
        if other != file:
            raise PydanticCustomError(
                "plain_text",
                "has two files named {name}, {one} and {other}; rename one",
                {"name": lora_name(file), "one": str(other), "other": str(file)},
            )
    return found


def _plain_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", value):
            raise PydanticCustomError(
                "plain_text", "contains {value}, which is not a host name", {"value": value}
            )
    return values


def _plain_origins(values: tuple[str, ...]) -> tuple[str, ...]:
    # No '*': it would let any site act through the browser of a user who has the key.
    for value in values:
        if not re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?", value):
            raise PydanticCustomError(
                "plain_text",
                "contains {value}, which is not an origin such as https://app.example",
                {"value": value},
            )
    return values


def _known_home() -> Path | None:
    """The home folder as the system names it, whether or not it exists."""
    if os.environ.get("HOME") == "":
        return None  # pathlib would take it for the root of the disk
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def _home() -> Path | None:
    """The home folder, if it can be used."""
    home = _known_home()
    is_usable = home is not None and os.path.isdir(home) and os.access(home, os.X_OK)  # noqa: PTH112
    return home if is_usable else None


def _here() -> Path | None:
    """The start folder; None if it has been removed."""
    try:
        return Path.cwd()
    except OSError:
        return None


def _without_tilde(path: Path) -> Path:
    if not str(path).startswith("~"):
        return path
    try:
        if path.parts[0] != "~" or _known_home() is not None:
            return path.expanduser()
    except RuntimeError:
        pass
    raise PydanticCustomError(
        "plain_text",
        "begins with {start}, but there is no such home folder; write the full path",
        {"start": path.parts[0]},
    )


def local_folders() -> tuple[Path, ...]:
    """The folders that local callers may use by default: home, start folder, temp folder.

    Services and containers often start in `/` or have it as their home: such a root is left out,
    because it would open the whole machine. Folders that cannot be entered are left out too.
    """
    found = [folder for folder in (_home(), _here()) if folder is not None]
    narrow = [folder for folder in found if folder != Path(folder.anchor)]
    with contextlib.suppress(OSError):  # there is no folder for temporary files
        narrow.append(Path(tempfile.gettempdir()))
    return tuple(narrow)


def start_folder() -> tuple[Path, ...]:
    """The folder that HTTP clients may use by default: the start folder, unless it is a disk."""
    folder = _here()
    return () if folder is None or folder == Path(folder.anchor) else (folder,)


def _data_folder() -> Path:
    if _home() is None and not os.environ.get("XDG_DATA_HOME"):
        return _NO_FOLDER
    return platformdirs.user_data_path("step1x-edit", appauthor=False)


def _remarks(settings: Settings) -> Iterator[str]:
    """Warnings about the environment that do not prevent the start."""
    needs_home = {"allowed_dirs", "data_dir"} - settings.model_fields_set
    if needs_home and _home() is None:
        shown = _known_home() or os.environ.get("HOME", "not set")
        yield (
            f"there is no usable home folder (HOME: {str(shown)!r}): it is left out of the allowed "
            "folders, and features that store files need DATA_DIR"
        )
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        yield (
            f"the locale ({_locale_name()}) is not UTF-8: file names and prompts with non-ASCII "
            "characters may fail; set LC_ALL=C.UTF-8"
        )


def _locale_name() -> str:
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    return next((f"{n}={os.environ[n]}" for n in names if os.environ.get(n)), "no LANG")


def inherited_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: this one's, with some changes."""
    return {**os.environ, **changes}


def stay_on_this_machine() -> None:
    """Make torch's collectives use the loopback device; they have no arguments for it."""
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = "lo"


def keep_gradio_quiet(folder: Path) -> None:
    """Make Gradio keep its files in `folder` and send nothing; it has no arguments for these."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def keep_ray_quiet() -> None:
    """Make Ray send no statistics, and let this process outlive a cluster that has gone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a call without a cluster starts one
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(MOST))


@dataclass(frozen=True)
class Limits:
    """How large a picture may be."""

    max_bytes: int
    max_pixels: int


class Settings(BaseSettings):
    """All settings of the server and the command line, checked."""

    model_config = SettingsConfigDict(
        env_file=None,  # `load_settings` passes it after checking it
        env_file_encoding="utf-8-sig",
        env_ignore_empty=True,
        extra="ignore",  # the environment and .env have variables of other programs too
        frozen=True,
    )

    _env_file: Path | None = PrivateAttr(None)
    _remarks: tuple[str, ...] = PrivateAttr(())

    model_path: Annotated[
        Path | None, Field(description="Checkpoint to load; unset: the built-in demo checkpoint")
    ] = None
    model_version: Annotated[
        Literal["auto", "demo", "v1.0", "v1.1", "v1.2", "v1.2-preview"],
        Field(description="Version that the checkpoint must have; auto: detect it"),
        BeforeValidator(_lower),
    ] = "auto"
    lora_path: Annotated[
        dict[Path, float],
        NoDecode,
        AfterValidator(_lora_files),
        BeforeValidator(_loras),
        Field(
            default_factory=dict,
            description=f"LoRA files to add to the model, separated by '{os.pathsep}'; file@0.8 "
            "adds one at strength 0.8. The files of a folder are only used by edits that name them",
        ),
    ]
    upscale_model: Annotated[
        Path | None,
        Field(
            description="Model file that `upscale` enlarges pictures with, .safetensors or .pth, "
            "of any architecture that spandrel reads; unset: pictures keep their size"
        ),
        AfterValidator(_model_file),
    ] = None
    gpu_idle_timeout: Annotated[
        int,
        Field(
            ge=0,
            le=MOST,
            description="Seconds without use until the model leaves the GPU; 0: never",
        ),
    ] = 60
    gpu_release_timeout: Annotated[
        int,
        Field(
            ge=0, le=MOST, description="Seconds without use until the model is unloaded; 0: never"
        ),
    ] = 0
    device: Annotated[
        str,
        Field(description="Where to compute: auto, cpu, cuda or cuda:N"),
        AfterValidator(_known_device),
        BeforeValidator(_lower),
    ] = "auto"
    gpus_per_edit: Annotated[
        int,
        Field(
            ge=1,
            le=GPUS_PER_EDIT[-1],
            description="On how many GPUs an edit runs; on a CPU, in how many processes: "
            f"{', '.join(map(str, GPUS_PER_EDIT))}. Needs Linux",
        ),
        AfterValidator(_possible_number),
    ] = 1
    precision: Annotated[
        Precision,
        Field(
            description="How weights are kept: bf16, or most of them as fp8, int8 or nf4, which "
            "needs a half or a third of the memory and changes pictures slightly; "
            "auto: exact if the host has enough memory"
        ),
        BeforeValidator(_lower),
    ] = "auto"
    arithmetic: Annotated[
        Arithmetic,
        Field(
            description="Numbers that the demo checkpoint and the autoencoder compute with on a "
            "CPU: fp32 or bf16; auto: bf16 if this processor is faster with it, measured once"
        ),
        BeforeValidator(_lower),
    ] = "auto"
    edit_cache_mb: Annotated[
        int,
        Field(
            ge=0,
            le=MOST,
            description="MiB of host memory for encoded pictures and prompts, so that the next "
            "edit of the same picture starts sooner; 0: nothing is kept",
        ),
    ] = 512
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
            description="Address to listen at; if other machines can reach it, set API_KEY",
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
            le=MOST,
            description="Seconds until edit_image answers with a job_id while the edit continues, "
            "for MCP clients that end long calls; 0: never",
        ),
    ] = 0
    enable_ui: Annotated[bool, Field(description="Whether there is a web page")] = True
    api_key: Annotated[
        Annotated[SecretStr, AfterValidator(_plain_key)] | None,
        Field(description="Key that HTTP clients must send as a bearer token; unset: none"),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Further host names of this server, such as a proxy's; separated by ','"),
        AfterValidator(_plain_names),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Sites whose pages may call this server, such as https://app.example, "
            "separated by ','; unset: only its own pages"
        ),
        AfterValidator(_plain_origins),
    ] = ()
    rate_limit: Annotated[
        int,
        Field(
            ge=0,
            le=MOST,
            description="Requests per minute that start work, per API key, or per IP address if no "
            "key is set. Bursts of up to a third of them, at most 20. 0: no limit",
        ),
    ] = 60
    max_queue: Annotated[int, Field(ge=1, le=MOST, description="Edits that may wait")] = 32
    max_upload_mb: Annotated[int, Field(ge=1, le=MOST, description="Largest input file in MiB")] = (
        32
    )
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            le=MOST,
            description="Connections at a time, an eighth of them for any other machine. If there "
            "are more, the one that has kept the server waiting longest is closed",
        ),
    ] = 256
    receive_timeout: Annotated[
        int,
        Field(
            ge=1,
            le=MOST,
            description="Seconds for the body of a request to arrive; 10 for its headers. After "
            "10 seconds a body must average 16 KiB a second",
        ),
    ] = 60
    # Pillow itself refuses pictures of twice its own limit, 178 megapixels.
    max_megapixels: Annotated[
        int, Field(ge=1, le=178, description="Largest input picture in millions of pixels")
    ] = 50
    edit_timeout: Annotated[
        int,
        Field(
            ge=1, le=MOST, description="Seconds that one edit may take, without loading the model"
        ),
    ] = 900
    load_timeout: Annotated[
        int,
        Field(ge=1, le=MOST, description="Seconds that loading the model for an edit may take"),
    ] = 3600
    data_dir: Annotated[
        Path,
        Field(
            default_factory=_data_folder,
            description="Folder for stored jobs, pictures of the page, the history, pulled models, "
            "and the note that announces a running server; unset: the user's data folder",
        ),
    ]
    jobs_max_mb: Annotated[
        int,
        Field(
            ge=1, le=MOST, description="MiB that stored jobs may use; the oldest are deleted first"
        ),
    ] = 2048
    jobs_max_age: Annotated[
        int,
        Field(ge=1, le=MOST, description="Seconds until a stored job that has ended is deleted"),
    ] = 7 * 86400
    history: Annotated[
        bool,
        Field(
            description="Whether edits on the page and by the command line are kept in DATA_DIR, "
            "so that they can be continued and compared later"
        ),
    ] = False
    history_mb: Annotated[
        int,
        Field(
            ge=1,
            le=MOST,
            description="MiB that the history may use; pictures that were left alone longest are "
            "deleted first, with all their steps",
        ),
    ] = 2048
    engine: Annotated[
        Literal["local", "ray"],
        Field(
            description="Where edits run: local: in one worker process of this machine; ray: on "
            "the replicas of a Ray cluster, created with step1x-edit cluster deploy"
        ),
        BeforeValidator(_lower),
    ] = "local"
    ray_address: Annotated[
        str,
        Field(
            min_length=1,
            description="Address of the Ray cluster, host:port; auto: the one of this machine",
        ),
    ] = "auto"
    ray_app: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_-]+$",
            description="Name of the replicas' application in Ray Serve",
        ),
    ] = "step1x-edit"
    ray_min_replicas: Annotated[
        int, Field(ge=0, le=MOST, description="Replicas that run also without work")
    ] = 1
    ray_max_replicas: Annotated[
        int, Field(ge=1, le=MOST, description="Most replicas, and edits at a time")
    ] = 1
    default_num_steps: NumSteps = DEFAULT_NUM_STEPS
    default_guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE
    default_size_level: SizeLevel = DEFAULT_SIZE_LEVEL
    default_mode: Annotated[ModeOfWork, BeforeValidator(_lower)] = DEFAULT_MODE
    record_prompt: Annotated[
        bool,
        Field(
            description="Whether the file of a result contains the prompts; without them the edit "
            "cannot be replayed from it"
        ),
    ] = True
    c2pa_cert: Annotated[
        Path | None,
        Field(
            description="Certificate chain to sign results with, in PEM, its own first; unset: "
            "results are not signed"
        ),
    ] = None
    c2pa_key: Annotated[
        Path | None,
        Field(description="Private key of this certificate, in PEM, without a password"),
    ] = None
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        Field(description="Lowest level that is logged"),
        BeforeValidator(_upper),
    ] = "INFO"
    log_format: Annotated[
        Literal["text", "json"],
        Field(description="Lines of text, or one JSON object per line"),
        BeforeValidator(_lower),
    ] = "text"

    @contextlib.contextmanager
    def naming_paths(self) -> Iterator[None]:
        """Make errors name settings instead of paths of this machine, which only the log has."""
        try:
            yield
        except Step1XEditError as error:
            if (sentence := self.without_paths(str(error))) != str(error):
                log.warning("%s", error)
                error.args = (sentence,)
            raise

    def without_paths(self, sentence: str) -> str:
        """The sentence with names instead of the paths in these settings and of this program."""
        names = {path: shown_file(path) for path in self.lora_path}
        names |= {self.data_dir: "DATA_DIR", _PACKAGE: "step1x_edit", Path(sys.prefix): "python"}
        if self.model_path is not None:
            names[self.model_path] = "MODEL_PATH"
        if self.upscale_model is not None:
            names[self.upscale_model] = "UPSCALE_MODEL"
        for path in sorted(names, key=lambda path: len(path.parts), reverse=True):
            if path.is_absolute() and path != path.parent:
                # Not in the middle of another path, such as /data in /database.
                whole = rf"(?<![\w.~-]){re.escape(str(path))}(?![\w~-]|\.\w)"
                sentence = re.sub(whole, names[path].replace("\\", r"\\"), sentence)
        return sentence

    @property
    def limits(self) -> Limits:
        """How large an input picture may be."""
        return Limits(self.max_bytes, self.max_pixels)

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
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name may resolve to any address
            return False

    def report(self) -> None:
        """Log which file the settings come from, and the warnings about the environment."""
        if self._env_file is not None:
            log.info("settings read from %s", self._env_file)
        for remark in self._remarks:
            log.warning("%s", remark)

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, given: dict[str, Any]) -> dict[str, Any]:
        texts = {name: value for name, value in given.items() if isinstance(value, str)}
        bare = {name: _bare(value) for name, value in texts.items() if name != "api_key"}
        if "api_key" in texts:
            bare["api_key"] = (
                texts["api_key"].strip() or " "
            )  # a blank key is no key, and no way in
        kept = {name: value for name, value in given.items() if name not in texts}
        return kept | {name: value for name, value in bare.items() if value}

    @field_validator(
        "model_path", "upscale_model", "data_dir", "c2pa_cert", "c2pa_key", mode="after"
    )
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return None if path is None else _without_tilde(path)

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.c2pa_cert is None) != (self.c2pa_key is None):
            raise PydanticCustomError(
                "both_or_none", "C2PA_CERT and C2PA_KEY must be set together, or neither"
            )
        return self

    @model_validator(mode="after")
    def _whole_devices(self) -> Self:
        if self.gpus_per_edit > 1 and ":" in self.device:
            raise PydanticCustomError(
                "one_or_several",
                "DEVICE names one GPU and GPUS_PER_EDIT is {number}: set DEVICE=cuda and limit "
                "CUDA_VISIBLE_DEVICES",
                {"number": self.gpus_per_edit},
            )
        return self

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if self.ray_min_replicas > self.ray_max_replicas:
            raise PydanticCustomError(
                "min_above_max", "RAY_MIN_REPLICAS must not be above RAY_MAX_REPLICAS"
            )
        return self

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
                return foreign_json.parse(value)
            except ValueError:
                raise PydanticCustomError("plain_text", "is not a list") from None
        return [part for part in map(_bare, value.split(os.pathsep)) if part]

    @field_validator("allowed_dirs", mode="after")
    @classmethod
    def _folders(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        folders = tuple(Path(os.path.realpath(_without_tilde(path))) for path in paths)
        for folder in folders:
            if not os.path.isdir(folder):  # noqa: PTH112 - pathlib's raises without permission
                raise PydanticCustomError(
                    "plain_text",
                    "contains {folder}, which is not a folder",
                    {"folder": str(folder)},
                )
        return folders


_NAMES: Final[Mapping[str, Parameter]] = {
    name: replace(parameter, name=name.upper())
    for name, parameter in parameters_of(Settings).items()
}


def load_settings(overrides: Mapping[str, object] | None = None) -> Settings:
    """Read the settings; `overrides` (flags, by field name) win, those that are None are left out.

    Raises SettingsError with all problems in one sentence.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    if unknown := given.keys() - Settings.model_fields.keys():
        raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
    here = _here()
    file = None if here is None else here / _ENV_FILE
    distrust = None
    try:
        if file is not None and not file.is_file():
            file = None
        elif file is not None and (distrust := _distrust(file)) is None:
            _check_text(file)
        settings = Settings(_env_file=None if distrust else file, **given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError("; ".join(complaints(error, _NAMES))) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"{file} cannot be read ({reason})") from None
    settings._env_file = None if distrust else file
    settings._remarks = (*([distrust] if distrust else ()), *_remarks(settings))
    return settings


def _distrust(file: Path) -> str | None:
    """Why a settings file is ignored: users other than this one and root could have written it."""
    if not hasattr(os, "geteuid"):
        return None  # Windows has no such owners and modes
    trusted = (0, os.geteuid())
    if file.lstat().st_uid not in trusted:  # a link of another user
        return f"{file} is not read: it belongs to another user"
    for path in (file, file.parent):
        found = path.stat()
        if found.st_uid not in trusted:
            return f"{file} is not read: {path} belongs to another user"
        is_shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # such as /tmp
        # A group whose id equals the user's is private: its bit opens the file to nobody else.
        is_group_of_others = found.st_mode & stat.S_IWGRP and found.st_gid != found.st_uid
        if not is_shared and (found.st_mode & stat.S_IWOTH or is_group_of_others):
            return f"{file} is not read: other users can write to {path} (chmod go-w)"
    return None


def _check_text(file: Path) -> None:
    """Raise SettingsError if a file is not UTF-8 text; UTF-16 would look like no settings."""
    data = file.read_bytes()
    try:
        is_text = "\0" not in data.decode()
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        raise SettingsError(f"{file} cannot be read: it is not UTF-8; save it again as UTF-8")


def load_server_settings(overrides: Mapping[str, object] | None = None) -> Settings:
    """Read the settings for an HTTP server: fewer folders by default, and no open access."""
    settings = load_settings(overrides)
    if not settings.is_loopback and settings.api_key is None:
        raise SettingsError(
            f"HOST {settings.host} can be reached from other machines: set API_KEY too, "
            "or HOST to 127.0.0.1"
        )
    is_shown = settings.history and settings.enable_ui
    if is_shown and settings.allowed_hosts and settings.api_key is None:
        raise SettingsError(
            "HISTORY shows every visitor of the page the pictures of all others, and ALLOWED_HOSTS "
            "lets others visit: set API_KEY too, or HISTORY to off"
        )
    if "allowed_dirs" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"allowed_dirs": start_folder()})
