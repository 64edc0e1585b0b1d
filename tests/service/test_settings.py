"""Settings come from flags, environment and .env; what is wrong is said all at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs
import pytest
from pydantic import SecretStr

from step1x_edit.errors import SettingsError
from step1x_edit.lora_names import lora_name
from step1x_edit.settings import (
    MOST,
    Settings,
    load_server_settings,
    load_settings,
    local_folders,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs owners, modes and HOME")
NUMBERS = [
    name for name, field in Settings.model_fields.items() if field.annotation in (int, float)
]


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
        "upscale_model": None,
        "gpu_idle_timeout": 60,
        "gpu_release_timeout": 0,
        "device": "auto",
        "gpus_per_edit": 1,
        "precision": "auto",
        "arithmetic": "auto",
        "edit_cache_mb": 512,
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
        "load_timeout": 3600,
        "data_dir": platformdirs.user_data_path("step1x-edit", appauthor=False),
        "jobs_max_mb": 2048,
        "jobs_max_age": 604800,
        "history": False,
        "history_mb": 2048,
        "engine": "local",
        "ray_address": "auto",
        "ray_app": "step1x-edit",
        "ray_min_replicas": 1,
        "ray_max_replicas": 1,
        "default_num_steps": 28,
        "default_guidance_scale": 6.0,
        "default_size_level": 1024,
        "default_mode": "exact",
        "record_prompt": True,
        "c2pa_cert": None,
        "c2pa_key": None,
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
        pytest.param(
            *("GPUS_PER_EDIT", "4", 4),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="it needs Linux"),
        ),
        ("PRECISION", " INT8", "int8"),
        ("DEFAULT_MODE", "Turbo", "turbo"),
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
        ("HISTORY", "on", True),
        ("HISTORY_MB", "5", 5),
        ("MAX_CONNECTIONS", "9", 9),
        ("RECEIVE_TIMEOUT", "5", 5),
        ("MAX_MEGAPIXELS", "12", 12),
        ("EDIT_TIMEOUT", "60", 60),
        ("LOAD_TIMEOUT", "60", 60),
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
        ("DEFAULT_MODE", "fast", "fast"),
        ("RECORD_PROMPT", "false", False),
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
    for name in ("b.sft", "a.safetensors", ".hidden.safetensors", "c.ckpt", "a.txt"):
        (folder / name).touch()
    a, b = folder / "a.safetensors", folder / "b.sft"

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
    assert "LORA_PATH has two files named a, " in str(caught.value)
    assert str(caught.value).endswith("; rename one")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_loras_of_peft_and_diffusers_have_the_names_of_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files = [tmp_path / folder / name for folder in ("hand", "look")]
    for file in files:
        file.parent.mkdir()
        file.touch()
    monkeypatch.setenv("LORA_PATH", f"{files[0].parent}{os.pathsep}{files[1]}")

    assert load_settings().lora_path == {files[0]: 0.0, files[1]: 1.0}
    assert list(map(lora_name, files)) == ["hand", "look"]


def test_flags_win_over_the_environment_and_this_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("MAX_QUEUE=1\nGPU_IDLE_TIMEOUT=1\nEDIT_TIMEOUT=1\nOTHER='x y'\n")
    monkeypatch.setenv("MAX_QUEUE", "2")
    monkeypatch.setenv("GPU_IDLE_TIMEOUT", "2")
    settings = load_settings({"max_queue": 3, "gpu_idle_timeout": None})
    assert (settings.max_queue, settings.gpu_idle_timeout, settings.edit_timeout) == (3, 2, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")
@pytest.mark.parametrize(
    ("sentence", "without_paths"),
    [
        (
            "cannot read /m/vae.safetensors: it ends",
            "cannot read MODEL_PATH/vae.safetensors: it ends",
        ),
        ("there is nothing at /m.", "there is nothing at MODEL_PATH."),
        ("'/data/jobs' is full", "'DATA_DIR/jobs' is full"),
        ("/m.png, /m-2/a.png, /models/a.png", "/m.png, /m-2/a.png, /models/a.png"),
        ("/tmp/m/a.png, /database/a.png", "/tmp/m/a.png, /database/a.png"),
    ],
)
def test_only_whole_paths_of_settings_are_replaced_by_names(
    sentence: str, without_paths: str
) -> None:
    settings = Settings(model_path=Path("/m"), data_dir=Path("/data"))

    assert settings.without_paths(sentence) == without_paths


def test_a_list_that_is_nested_too_deeply_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALLOWED_DIRS", "[" * 100_000)

    with pytest.raises(SettingsError, match="ALLOWED_DIRS is not a list"):
        load_settings()


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
        "GPUS_PER_EDIT": "5",
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
        "HISTORY": "perhaps",
        "HISTORY_MB": "0",
        "MAX_CONNECTIONS": "0",
        "RECEIVE_TIMEOUT": "0",
        "MAX_MEGAPIXELS": "1000",
        "EDIT_TIMEOUT": "0",
        "LOAD_TIMEOUT": "0",
        "DEFAULT_NUM_STEPS": "5",
        "DEFAULT_GUIDANCE_SCALE": "nan",
        "DEFAULT_SIZE_LEVEL": "600",
        "DEFAULT_MODE": "quick",
        "RECORD_PROMPT": "perhaps",
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
    assert "ALLOWED_DIRS contains /nope, which is not a folder" in sentence
    assert "pydantic" not in sentence
    assert "spaces, got" not in sentence  # a key is not repeated


@pytest.mark.skipif(sys.platform != "linux", reason="several GPUs need Linux")
@pytest.mark.parametrize(
    ("device", "number", "sentence"),
    [
        ("auto", "5", "GPUS_PER_EDIT must be one of 1, 2, 3, 4, 6, 8, 12, 16, because"),
        ("cuda:1", "2", "DEVICE names one GPU and GPUS_PER_EDIT is 2"),
    ],
)
def test_an_edit_on_several_gpus_needs_a_number_that_divides_it_and_no_single_gpu(
    device: str, number: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", device)
    monkeypatch.setenv("GPUS_PER_EDIT", number)
    with pytest.raises(SettingsError, match=sentence):
        load_settings()


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
    with pytest.raises(SettingsError, match=f"{name} contains .*, which is not"):
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


def test_a_page_with_history_behind_a_proxy_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY", "on")
    assert load_server_settings().history
    monkeypatch.setenv("ALLOWED_HOSTS", "pictures.example")
    with pytest.raises(SettingsError, match=r"every visitor of the page .* set API_KEY too"):
        load_server_settings()
    assert load_server_settings({"enable_ui": False}).history
    assert load_server_settings({"api_key": "secret"}).history


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


@pytest.mark.parametrize(
    "data",
    [b"MAX_QUEUE=\xff\xfe", "MAX_QUEUE=9".encode("utf-16"), "MAX_QUEUE=9".encode("utf-16-le")],
)
def test_a_file_of_settings_that_is_not_utf_8_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".env").write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == (
        f"Invalid settings: {tmp_path / '.env'} cannot be read: it is not UTF-8; "
        "save it again as UTF-8"
    )


def test_a_file_of_settings_may_begin_with_the_mark_of_windows(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("MAX_QUEUE=9\r\nEDIT_TIMEOUT=8\r\n".encode("utf-8-sig"))
    settings = load_settings()
    assert (settings.max_queue, settings.edit_timeout) == (9, 8)


# --- a file of somebody else ----------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("file_mode", "folder_mode", "is_read"),
    [
        (0o600, 0o755, True),
        (0o644, 0o1777, True),  # nobody else can replace it there
        (0o664, 0o775, True),  # by a private group, of which nobody else is a member
        (0o646, 0o755, False),
        (0o644, 0o757, False),
    ],
)
def test_a_file_of_settings_that_others_may_write_is_not_read(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file_mode: int,
    folder_mode: int,
    is_read: bool,
) -> None:
    file = tmp_path / ".env"
    file.write_text("ALLOWED_DIRS=/\nHOST=0.0.0.0\nAPI_KEY=known\nDATA_DIR=/tmp/theirs\n")
    for path, mode in ((file, file_mode), (tmp_path, folder_mode)):
        os.chown(path, os.geteuid(), os.geteuid())
        path.chmod(mode)
    caplog.set_level("INFO")
    settings = load_settings()
    settings.report()

    assert (settings.allowed_dirs == (Path("/"),)) is is_read
    assert (settings.host, settings.api_key is None) == (
        ("0.0.0.0", False) if is_read else ("127.0.0.1", True)
    )
    told = (
        f"settings read from {file}" if is_read else f"{file} is not read: other users can write to"
    )
    assert told in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_a_file_of_settings_of_another_user_is_not_read(tmp_path: Path, whose: str) -> None:
    (tmp_path / ".env").write_text("HOST=0.0.0.0\n")
    os.chown(tmp_path / ".env" if whose == "file" else tmp_path, 12345, -1)
    assert load_settings().host == "127.0.0.1"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files away")
def test_a_link_of_another_user_to_a_file_of_ours_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("HOST=0.0.0.0\n")
    (tmp_path / ".env").symlink_to(tmp_path / "ours")
    assert load_settings().host == "0.0.0.0"
    os.chown(tmp_path / ".env", 12345, -1, follow_symlinks=False)
    assert load_settings().host == "127.0.0.1"


@posix
def test_a_file_for_a_group_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("HOST=0.0.0.0\n")
    (tmp_path / ".env").chmod(0o664)
    if (tmp_path / ".env").stat().st_gid == os.geteuid():
        groups = [group for group in os.getgroups() if group != os.geteuid()]
        if not groups and os.geteuid() != 0:
            pytest.skip("this user has but a private group")
        os.chown(tmp_path / ".env", -1, (groups or [12345])[0])
    assert load_settings().host == "127.0.0.1"


# --- odd surroundings -----------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("home", ["/nonexistent", "", "relative", "{file}"])
def test_a_home_that_cannot_be_used_is_left_out_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", home.format(file=tmp_path / "file"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    settings = load_settings()
    settings.report()

    assert settings.allowed_dirs == (tmp_path, Path(tempfile.gettempdir()))
    assert settings.data_dir == Path("/dev/null/step1x-edit")
    (line,) = caplog.messages
    assert line.startswith("there is no usable home folder (HOME: ")
    assert "DATA_DIR" in line


@posix
def test_a_user_that_the_system_does_not_know_has_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("HOME")
    settings = load_settings()

    assert settings.allowed_dirs == (tmp_path, Path(tempfile.gettempdir()))
    assert settings.data_dir == Path("/dev/null/step1x-edit")


@posix
def test_a_home_that_is_not_needed_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("ALLOWED_DIRS", str(tmp_path))
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    load_settings().report()
    assert caplog.messages == []


@posix
@pytest.mark.parametrize("name", ["MODEL_PATH", "DATA_DIR", "ALLOWED_DIRS", "LORA_PATH"])
@pytest.mark.parametrize("start", ["~", "~no-such-user"])
def test_a_home_that_a_setting_names_and_nobody_knows_is_an_error(
    name: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv(name, f"{start}/x")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert f"{name} begins with {start}, but there is no such home folder" in str(caught.value)


@posix
def test_a_locale_without_utf_8_is_named_in_one_line(tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "from step1x_edit.settings import load_settings; load_settings().report()"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ascii_only, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = told.stderr.splitlines()
    assert line.startswith("the locale (LC_ALL=C) is not UTF-8")


@posix
def test_a_start_folder_that_is_gone_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load_settings().allowed_dirs == (Path.home(), Path(tempfile.gettempdir()))
    assert load_server_settings().allowed_dirs == ()


# --- blanks and quotes ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{} ", "\t{}\r\n", "'{}'", '"{}"', '" {} "', "\u00a0{}"])
@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("MODEL_PATH", "v1.1", Path("v1.1")),
        ("DATA_DIR", "/data", Path("/data")),
        ("ALLOWED_DIRS", "/usr", (Path("/usr"),)),
        ("LORA_PATH", "/a b.safetensors@0.8", {Path("/a b.safetensors"): 0.8}),
        ("HOST", "::1", "::1"),
        ("PORT", "80", 80),
        ("ENABLE_API", "false", False),
        ("ALLOWED_HOSTS", "a.example,b.example", ("a.example", "b.example")),
        ("DEVICE", "cpu", "cpu"),
        ("LOG_FORMAT", "json", "json"),
    ],
)
def test_blanks_line_ends_and_quotes_around_a_value_do_not_belong_to_it(
    form: str, name: str, value: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, form.format(value))
    assert getattr(load_settings(), name.lower()) == read


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("ALLOWED_DIRS", "'/usr' : \"/etc\" :", (Path("/usr"), Path("/etc"))),
        (
            "LORA_PATH",
            "'/a.safetensors'@0.5: '/b.safetensors' ",
            {
                Path("/a.safetensors"): 0.5,
                Path("/b.safetensors"): 1.0,
            },
        ),
        ("MODEL_PATH", " \t", None),
        ("MODEL_PATH", '""', None),
        ("MODEL_PATH", "it's", Path("it's")),
        ("API_KEY", " key\r\n", SecretStr("key")),
    ],
)
def test_blanks_and_quotes_of_a_part_do_not_belong_to_it_either(
    name: str, value: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value.replace(":", os.pathsep))
    assert getattr(load_settings(), name.lower()) == read


@pytest.mark.parametrize("key", ["'secret'", '"secret"', " ", '""', "' '"])
def test_a_key_in_quotes_or_of_blanks_is_refused_and_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", key)
    with pytest.raises(SettingsError, match="API_KEY must") as caught:
        load_settings()
    assert "secret" not in str(caught.value)


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_an_upper_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (MOST + 1, 10**20):
        monkeypatch.setenv(name.upper(), str(value))
        with pytest.raises(SettingsError, match=f"{name.upper()} must be between .*, got {value}"):
            load_settings()
