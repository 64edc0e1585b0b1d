"""Settings come from flags, environment and .env; what is wrong is said all at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs
import pytest
from pydantic import SecretStr

from step1x_edit.errors import SettingsError
from step1x_edit.settings import (
    Settings,
    load_server_settings,
    load_settings,
    local_folders,
)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those of the test."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    assert load_settings().model_dump() == {
        "model_path": None,
        "model_version": "auto",
        "lora_path": {},
        "gpu_idle_timeout": 60,
        "gpu_release_timeout": 0,
        "device": "auto",
        "precision": "auto",
        "allowed_dirs": (Path.home(), tmp_path, Path(tempfile.gettempdir())),
        "host": "127.0.0.1",
        "port": 8000,
        "enable_api": True,
        "enable_mcp": True,
        "mcp_max_wait": 0,
        "enable_ui": True,
        "api_key": None,
        "allowed_hosts": (),
        "allowed_origins": (),
        "rate_limit": 60,
        "max_queue": 32,
        "max_upload_mb": 32,
        "max_connections": 256,
        "receive_timeout": 60,
        "max_megapixels": 50,
        "edit_timeout": 900,
        "data_dir": platformdirs.user_data_path("step1x-edit", appauthor=False),
        "jobs_max_mb": 2048,
        "jobs_max_age": 604800,
        "default_num_steps": 28,
        "default_guidance_scale": 6.0,
        "default_size_level": 1024,
        "log_level": "INFO",
        "log_format": "text",
    }


@pytest.mark.parametrize("home", ["/", None])
def test_neither_a_root_nor_an_unknown_home_is_opened_by_default(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_home() -> Path:
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return Path(home)

    monkeypatch.setattr(Path, "home", find_home)
    monkeypatch.setattr(Path, "cwd", lambda: Path("/"))

    assert local_folders() == (Path(tempfile.gettempdir()),)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("MODEL_PATH", "~/models", Path.home() / "models"),
        ("MODEL_PATH", "", None),
        ("MODEL_VERSION", "V1.1", "v1.1"),
        ("MODEL_VERSION", "V1.2-preview", "v1.2-preview"),
        ("LORA_PATH", "/a/hand.safetensors", {Path("/a/hand.safetensors"): 1.0}),
        (
            "LORA_PATH",
            f"~/a.safetensors@0.8{os.pathsep}/b@home/c@-1.5{os.pathsep}d@e.safetensors",
            {
                Path.home() / "a.safetensors": 0.8,
                Path("/b@home/c"): -1.5,
                Path("d@e.safetensors"): 1.0,
            },
        ),
        ("LORA_PATH", "a.safetensors@0", {Path("a.safetensors"): 0.0}),
        ("GPU_IDLE_TIMEOUT", "300", 300),
        ("GPU_RELEASE_TIMEOUT", "900", 900),
        ("DATA_DIR", "~/data", Path.home() / "data"),
        ("DEVICE", "cuda:1", "cuda:1"),
        ("PRECISION", " INT8", "int8"),
        ("MAX_QUEUE", "2", 2),
        ("MAX_UPLOAD_MB", "5", 5),
        (
            "ALLOWED_HOSTS",
            "Pictures.example, other.example,",
            ("pictures.example", "other.example"),
        ),
        ("ALLOWED_HOSTS", "", ()),
        (
            "ALLOWED_ORIGINS",
            "https://App.example,http://[::1]:80",
            ("https://app.example", "http://[::1]:80"),
        ),
        ("RATE_LIMIT", "0", 0),
        ("JOBS_MAX_MB", "1", 1),
        ("JOBS_MAX_AGE", "60", 60),
        ("MAX_CONNECTIONS", "9", 9),
        ("RECEIVE_TIMEOUT", "5", 5),
        ("MAX_MEGAPIXELS", "12", 12),
        ("EDIT_TIMEOUT", "60", 60),
        ("HOST", "0.0.0.0", "0.0.0.0"),
        ("PORT", "0", 0),
        ("ENABLE_API", "false", False),
        ("ENABLE_MCP", "0", False),
        ("MCP_MAX_WAIT", "200", 200),
        ("ENABLE_UI", "no", False),
        ("API_KEY", "a+b/c=", SecretStr("a+b/c=")),
        ("DEFAULT_NUM_STEPS", "20", 20),
        ("DEFAULT_GUIDANCE_SCALE", "4.5", 4.5),
        ("DEFAULT_SIZE_LEVEL", "512", 512),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("LOG_FORMAT", "JSON", "json"),
    ],
)
def test_every_setting_is_read_from_the_environment(
    name: str, value: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(load_settings(), name.lower()) == read


def test_loras_in_a_folder_are_there_and_added_only_if_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("b.safetensors", "a.safetensors", ".hidden.safetensors", "c.ckpt", "a.txt"):
        (folder / name).touch()
    a, b = folder / "a.safetensors", folder / "b.safetensors"

    def read(value: str) -> dict[Path, float]:
        monkeypatch.setenv("LORA_PATH", value)
        return load_settings().lora_path

    assert read(str(folder)) == {a: 0.0, b: 0.0}
    assert list(read(str(folder))) == [a, b]
    assert read(f"{folder}@0.5") == {a: 0.5, b: 0.5}
    assert read(f"{folder}{os.pathsep}{b}@0.8") == {a: 0.0, b: 0.8}
    assert read(f"{b}@0.8{os.pathsep}{folder}") == {a: 0.0, b: 0.8}
    with pytest.raises(SettingsError) as caught:
        read(f"{folder}{os.pathsep}{tmp_path}/a.safetensors")
    assert "LORA_PATH has two files of the name a, " in str(caught.value)
    assert str(caught.value).endswith("; rename one")


def test_flags_win_over_the_environment_and_this_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("MAX_QUEUE=1\nGPU_IDLE_TIMEOUT=1\nEDIT_TIMEOUT=1\nOTHER='x y'\n")
    monkeypatch.setenv("MAX_QUEUE", "2")
    monkeypatch.setenv("GPU_IDLE_TIMEOUT", "2")
    settings = load_settings({"max_queue": 3, "gpu_idle_timeout": None})
    assert (settings.max_queue, settings.gpu_idle_timeout, settings.edit_timeout) == (3, 2, 1)


def test_limits_are_told_in_bytes_and_pixels() -> None:
    settings = load_settings({"max_upload_mb": 2, "max_megapixels": 3})
    assert (settings.max_bytes, settings.max_pixels) == (2 * 2**20, 3_000_000)


@pytest.mark.parametrize("form", ["{0}" + os.pathsep + "{1}", '["{0}", "{1}"]'])
def test_allowed_folders_are_a_list(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (tmp_path / "a b", tmp_path / "c,d")
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("ALLOWED_DIRS", form.format(*(folder.as_posix() for folder in folders)))
    assert load_settings().allowed_dirs == folders


def test_everything_that_is_wrong_is_said_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "GPU_IDLE_TIMEOUT": "-5",
        "MODEL_VERSION": "v9",
        "DEVICE": "tpu",
        "PRECISION": "fp4",
        "LORA_PATH": "a.safetensors@much",
        "ALLOWED_DIRS": "/nope",
        "PORT": "65536",
        "ENABLE_API": "maybe",
        "API_KEY": "key with spaces",
        "MAX_QUEUE": "many",
        "ALLOWED_HOSTS": "pictures.example:80",
        "ALLOWED_ORIGINS": "*",
        "RATE_LIMIT": "-1",
        "JOBS_MAX_MB": "0",
        "JOBS_MAX_AGE": "0",
        "MAX_CONNECTIONS": "0",
        "RECEIVE_TIMEOUT": "0",
        "MAX_MEGAPIXELS": "1000",
        "EDIT_TIMEOUT": "0",
        "DEFAULT_NUM_STEPS": "5",
        "DEFAULT_GUIDANCE_SCALE": "nan",
        "DEFAULT_SIZE_LEVEL": "600",
        "LOG_LEVEL": "loud",
        "LOG_FORMAT": "xml",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    sentence = str(caught.value)
    assert sentence.startswith("Invalid settings: ")
    assert [name for name in wrong if name not in sentence] == []
    assert "DEFAULT_NUM_STEPS must be between 10 and 50, got 5" in sentence
    assert "ALLOWED_DIRS holds /nope, which is not a folder" in sentence
    assert "pydantic" not in sentence
    assert "spaces, got" not in sentence  # a key is not repeated


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALLOWED_HOSTS", "*"),
        ("ALLOWED_HOSTS", "*.example"),
        ("ALLOWED_HOSTS", "https://pictures.example"),
        ("ALLOWED_ORIGINS", "app.example"),
        ("ALLOWED_ORIGINS", "https://*.example"),
        ("ALLOWED_ORIGINS", "https://app.example/"),
        ("ALLOWED_ORIGINS", "null"),
        ("ALLOWED_ORIGINS", "file:///home"),
    ],
)
def test_hosts_and_origins_are_named_one_by_one(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} holds .*, which is not"):
        load_settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "pictures.example"])
def test_a_server_that_others_reach_wants_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="set API_KEY") as caught:
        load_server_settings({"host": host})
    monkeypatch.setenv("API_KEY", "secret")

    assert "\n" not in str(caught.value)
    assert load_server_settings({"host": host}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_for_this_machine_needs_none(host: str) -> None:
    assert load_server_settings({"host": host}).api_key is None


def test_over_http_only_the_start_folder_is_open_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = load_server_settings().allowed_dirs
    monkeypatch.setenv("ALLOWED_DIRS", str(tmp_path.parent))
    chosen = load_server_settings().allowed_dirs
    monkeypatch.delenv("ALLOWED_DIRS")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/"))

    assert narrow == (tmp_path,)
    assert chosen == (tmp_path.parent,)
    assert load_server_settings().allowed_dirs == ()


def test_a_key_is_not_shown_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert "secret" not in repr(load_settings())


def test_a_flag_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(TypeError, match="nope"):
        load_settings({"nope": 1})


def test_an_unreadable_file_of_settings_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"MAX_QUEUE=\xff\xfe")
    with pytest.raises(SettingsError, match="env cannot be read"):
        load_settings()
