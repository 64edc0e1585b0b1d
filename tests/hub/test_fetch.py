"""Pulling models from a hub that lies on this machine and fails in all the ways that hubs do."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from huggingface_hub import constants

from http_server import until
from local_hub import LISTING, Fault, Hub, running_hub
from step1x_edit.errors import (
    CheckpointError,
    EditCancelledError,
    InvalidParameterError,
    ModelFetchError,
    NoSpaceError,
    OutputNotWritableError,
)
from step1x_edit.hub import fetch
from step1x_edit.hub.catalog import CATALOG, QWEN, find_model
from step1x_edit.hub.fetch import PullProgress, pull
from step1x_edit.hub.pulled import (
    find_pulled,
    kept_models,
    remove_model,
    resolve_model_path,
)

WEIGHTS = random.Random(0).randbytes(400_000)
TINY = "acme/tiny"
BIG = "model.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repos[TINY] = {
            "config.json": b'{"a": 1}',
            "empty.txt": b"",
            "text/tokenizer.json": b"{}" * 700,
            "chat_template.jinja": b"{{ messages }}",
            BIG: WEIGHTS,
            "README.md": b"read me",
            "run.py": b"print('no')",
            "weights.bin": b"a pickle",
        }
        yield hub


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to other machines fail, however they are made."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    resolve = socket.getaddrinfo

    def resolve_local(host: object, *args: object, **kwargs: object) -> object:
        assert host in ("127.0.0.1", "localhost", "::1"), host
        return resolve(host, *args, **kwargs)  # type: ignore

    monkeypatch.setattr(socket, "getaddrinfo", resolve_local)


def fetched(
    hub: Hub,
    models: Path,
    name: str = TINY,
    report: Callable[[PullProgress], None] = lambda progress: None,
    wait: Callable[[float], None] = lambda seconds: None,
) -> Path:
    return pull(name, models, report, endpoint=hub.url, wait=wait)


def partial(models: Path, file: str = BIG) -> Path:
    return models / "acme--tiny.partial" / file


def refusal(hub: Hub, models: Path, name: str = TINY) -> str:
    """The sentence of a pull that fails, which leaves no model."""
    with pytest.raises(ModelFetchError) as caught:
        fetched(hub, models, name)
    with pytest.raises(ModelFetchError, match="is not pulled"):
        find_pulled(name, models)
    return str(caught.value)


# --- what arrives --------------------------------------------------------------------------------


def test_a_pull_brings_the_files_that_do_not_run_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    folder = fetched(hub, tmp_path)

    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert found.keys() == {
        "config.json",
        "empty.txt",
        "text/tokenizer.json",
        "chat_template.jinja",
        BIG,
    }
    assert all(path.read_bytes() == hub.repos[TINY][name] for name, path in found.items())
    assert find_pulled(TINY, tmp_path) == folder


def test_the_official_files_get_the_conditioner_beside_them(hub: Hub, tmp_path: Path) -> None:
    official = find_model("v1.0").sources[0]
    hub.repos[official.repo] = {
        "step1x-edit-i1258.safetensors": b"v1.0",
        "step1x-edit-v1p1-official.safetensors": b"v1.1",
        "vae.safetensors": b"vae",
        "config.json": b"{}",
        "lora/hand.safetensors": b"lora",
    }
    hub.repos[QWEN.repo] = {"config.json": b"{}", "model-1.safetensors": b"vlm"}

    folder = fetched(hub, tmp_path, "v1.1")

    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "step1x-edit-v1p1-official.safetensors",
        "vae.safetensors",
        "Qwen2.5-VL-7B-Instruct/config.json",
        "Qwen2.5-VL-7B-Instruct/model-1.safetensors",
    }


def test_what_another_model_has_is_neither_fetched_nor_kept_twice(hub: Hub, tmp_path: Path) -> None:
    same_length = bytes(reversed(WEIGHTS[:5000]))
    hub.repos["acme/first"] = {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[:5000]}
    hub.repos["acme/second"] = {"c/d.safetensors": WEIGHTS, "e.safetensors": same_length}
    first = fetched(hub, tmp_path, "acme/first")
    hub.served.clear()
    told: list[PullProgress] = []

    second = fetched(hub, tmp_path, "acme/second", report=told.append)

    assert hub.served == {"e.safetensors": 5000}
    assert told[-1].done == told[-1].total == len(WEIGHTS) + 5000
    assert (second / "c/d.safetensors").samefile(first / "a.safetensors")
    assert (second / "e.safetensors").read_bytes() == same_length
    assert (first / "b.safetensors").read_bytes() == WEIGHTS[:5000]
    remove_model("acme/first", tmp_path)
    assert (second / "c/d.safetensors").read_bytes() == WEIGHTS


def test_a_repository_that_lost_a_file_is_not_half_a_model(hub: Hub, tmp_path: Path) -> None:
    hub.repos[find_model("v1.0").sources[0].repo] = {"vae.safetensors": b"vae"}

    assert "has no step1x-edit-i1258.safetensors" in refusal(hub, tmp_path, "v1.0")


def test_a_model_that_is_there_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    folder = fetched(hub, tmp_path)
    asked = len(hub.requests)

    assert fetched(hub, tmp_path) == folder
    assert len(hub.requests) == asked


def test_progress_rises_and_ends_at_the_total(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=150_000)])
    told: list[PullProgress] = []

    fetched(hub, tmp_path, report=told.append)

    total = sum(len(c) for n, c in hub.repos[TINY].items() if n not in NOT_FETCHED)
    done = [progress.done for progress in told]
    assert done == sorted(done)
    assert {progress.total for progress in told} == {total}
    assert done[-1] == total
    assert len(set(done)) > 5  # not in one leap
    assert {progress.phase for progress in told} == {"downloading", "checking", "waiting"}


NOT_FETCHED = {"README.md", "run.py", "weights.bin"}


def test_a_check_of_a_large_file_can_be_left(hub: Hub, tmp_path: Path) -> None:
    hub.repos[TINY][BIG] = bytes(3 * fetch.READ_SIZE)
    checks = []

    def leave(progress: PullProgress) -> None:
        if (progress.phase, progress.text) == ("checking", BIG):
            checks.append(progress)
            if len(checks) == 3:
                raise EditCancelledError

    with pytest.raises(EditCancelledError):
        fetched(hub, tmp_path, report=leave)

    assert partial(tmp_path).stat().st_size == 3 * fetch.READ_SIZE
    with pytest.raises(ModelFetchError, match="is not pulled"):
        find_pulled(TINY, tmp_path)


def test_nothing_but_the_listing_and_the_files_is_asked_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI_AGENT", "somebody")  # of which the hub's library would tell

    fetched(hub, tmp_path)

    paths = [path for path, _ in hub.requests]
    assert paths[0] == f"/api/models/{TINY}"
    wanted = {name for name in hub.repos[TINY] if name not in NOT_FETCHED | {"empty.txt"}}
    assert {path.split("/", 5)[-1] for path in paths if "/resolve/" in path} == wanted
    assert len(paths) == 1 + len(wanted) + 1  # the large file is asked for in two places
    agents = {headers["user-agent"] for _, headers in hub.requests}
    assert not any("agent/" in agent or "torch" in agent for agent in agents)


def test_a_token_is_shown_to_the_hub_and_not_to_where_it_keeps_large_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    fetched(hub, tmp_path)

    shown = {path: "authorization" in headers for path, headers in hub.requests}
    assert shown.pop(f"/cdn/{TINY}/{BIG}") is False
    assert all(shown.values())


# --- a bad line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_after=100_000),
        Fault(cut_after=0),
        Fault(cut_after=100_000, announce=False),
        Fault(503),
        Fault(500),
        Fault(429),
        Fault(flip=True),
    ],
    ids=["cut", "cut at once", "cut without a length", "503", "500", "429", "wrong byte"],
)
def test_what_fails_once_is_tried_again(hub: Hub, tmp_path: Path, fault: Fault) -> None:
    hub.faults[BIG] = iter([fault])

    assert (fetched(hub, tmp_path) / BIG).read_bytes() == WEIGHTS


def test_a_line_that_breaks_all_the_time_gets_there(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = repeat(Fault(cut_after=20_000))

    assert (fetched(hub, tmp_path) / BIG).read_bytes() == WEIGHTS
    assert hub.served[BIG] < len(WEIGHTS) * 1.1


def test_a_server_that_falls_silent_is_asked_for_the_rest(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.faults[BIG] = iter([Fault(stall_after=100_000)])

    assert (fetched(hub, tmp_path) / BIG).read_bytes() == WEIGHTS
    assert hub.served[BIG] == len(WEIGHTS)


def test_the_pauses_grow_and_the_server_may_ask_for_its_own(hub: Hub, tmp_path: Path) -> None:
    asked = Fault(429, {"Retry-After": "17"})
    hub.faults[LISTING] = iter([Fault(503), Fault(503), Fault(503), asked])
    hub.faults[BIG] = iter([Fault(502), Fault(429, {"Retry-After": "99999"})])
    pauses: list[float] = []

    fetched(hub, tmp_path, wait=pauses.append)

    first, second, third, *rest = pauses
    assert first < second < third
    assert rest == [17, first, fetch.LONGEST_PAUSE_S]


def test_files_that_arrive_compressed_are_unpacked(hub: Hub, tmp_path: Path) -> None:
    hub.faults["text/tokenizer.json"] = iter([Fault(compress=True)])

    folder = fetched(hub, tmp_path)

    assert (folder / "text/tokenizer.json").read_bytes() == hub.repos[TINY]["text/tokenizer.json"]


def test_a_server_without_ranges_begins_anew(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=100_000), Fault(ranges=False)])
    told: list[PullProgress] = []

    assert (fetched(hub, tmp_path, report=told.append) / BIG).read_bytes() == WEIGHTS
    assert hub.served[BIG] == 100_000 + len(WEIGHTS)
    assert told[-1].done == told[-1].total


def test_giving_up_keeps_what_arrived_and_the_next_pull_fetches_the_rest(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=300_000), *repeat(Fault(503), 20)])

    assert "answers 503" in refusal(hub, tmp_path)
    kept = partial(tmp_path).stat().st_size
    assert 200_000 < kept <= 300_000
    hub.faults.clear()
    hub.served.clear()
    told: list[PullProgress] = []
    folder = fetched(hub, tmp_path, report=told.append)

    assert (folder / BIG).read_bytes() == WEIGHTS
    assert hub.served == {BIG: len(WEIGHTS) - kept}
    assert told[0].done >= kept
    assert not partial(tmp_path).exists()


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_pull_leaves_no_model_and_the_next_one_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = iter([Fault(stall_after=300_000)])
    code = "import sys; from pathlib import Path; from step1x_edit.hub.fetch import pull; "
    code += f"pull({TINY!r}, Path(sys.argv[1]))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environment) as process:
        until(lambda: partial(tmp_path).exists() and partial(tmp_path).stat().st_size > 200_000)
        assert "another process is pulling" in refusal(hub, tmp_path)
        assert [kept.state for kept in kept_models(tmp_path)] == ["partial"]
        process.send_signal(signal.SIGKILL)

    kept = partial(tmp_path).stat().st_size
    with pytest.raises(ModelFetchError, match=rf"models pull {TINY}"):
        find_pulled(TINY, tmp_path)
    hub.served.clear()
    assert (fetched(hub, tmp_path) / BIG).read_bytes() == WEIGHTS
    assert hub.served == {BIG: len(WEIGHTS) - kept}


def test_what_was_begun_of_an_older_state_of_the_model_does_not_spoil_it(
    hub: Hub, tmp_path: Path
) -> None:
    partial(tmp_path).parent.mkdir(parents=True)
    partial(tmp_path).write_bytes(b"other" * 1000)
    partial(tmp_path, "config.json").write_bytes(b'{"b": 2}')  # of the right length
    partial(tmp_path, "text").mkdir()
    partial(tmp_path, "text/tokenizer.json").write_bytes(b"longer" * 1000)
    partial(tmp_path, "gone.json").write_bytes(b"{}")
    partial(tmp_path, "run.py").write_bytes(b"print('no')")

    folder = fetched(hub, tmp_path)

    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == hub.repos[TINY].keys() - NOT_FETCHED
    assert all((folder / name).read_bytes() == hub.repos[TINY][name] for name in found)


# --- what cannot be ------------------------------------------------------------------------------


def test_content_that_is_not_what_the_hub_lists_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = repeat(Fault(flip=True))

    assert f"{BIG} does not match its checksum" in refusal(hub, tmp_path)


def test_small_files_are_checked_as_well(hub: Hub, tmp_path: Path) -> None:
    hub.faults["config.json"] = repeat(Fault(flip=True))

    assert "config.json does not match its checksum" in refusal(hub, tmp_path)


@pytest.mark.parametrize("more", [-7, 7])
def test_a_file_of_another_length_is_refused(hub: Hub, tmp_path: Path, more: int) -> None:
    hub.faults[BIG] = repeat(Fault(lengthen=more))

    assert f"({len(WEIGHTS) + more} instead of {len(WEIGHTS)} bytes)" in refusal(hub, tmp_path)


def test_a_server_that_ends_early_and_never_says_so_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = repeat(Fault(cut_after=0, announce=False))

    assert "fails repeatedly" in refusal(hub, tmp_path)


def test_more_than_was_listed_is_refused_without_an_announced_length(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults[BIG] = repeat(Fault(announce=False))
    listing = hub.listing

    def grown(repo: str) -> dict[str, object]:
        found = listing(repo)
        hub.repos[TINY][BIG] = WEIGHTS + b"!"  # after it was listed
        return found

    hub.listing = grown  # type: ignore
    assert "(more instead of" in refusal(hub, tmp_path)


def test_a_file_that_changed_after_it_was_listed_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=100_000)])
    listing = hub.listing

    def grown(repo: str) -> dict[str, object]:
        found = listing(repo)
        hub.repos[TINY][BIG] = WEIGHTS + b"!"  # after it was listed
        return found

    hub.listing = grown  # type: ignore
    assert "in another size than it lists" in refusal(hub, tmp_path)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault(401), "requires a valid token for acme/tiny"),
        (Fault(403), "acme/tiny is gated"),
        (Fault(401, {"X-Error-Code": "GatedRepo"}), "acme/tiny is gated"),
        (Fault(404), "has no acme/tiny"),
        (Fault(429), "reports too many requests"),
        (Fault(503), "answers 503"),
        (Fault(200, body=b"<html>Please log in</html>"), "does not answer as the hub does"),
        (Fault(200, body=b"[]"), "does not answer as the hub does"),
        (Fault(200, body=b"{}"), "does not answer as the hub does"),
    ],
    ids=lambda value: str(value.status or value) if isinstance(value, Fault) else "",
)
def test_what_the_hub_refuses_is_told_in_one_sentence(
    hub: Hub, tmp_path: Path, fault: Fault, told: str
) -> None:
    hub.faults[LISTING] = repeat(fault)

    sentence = refusal(hub, tmp_path)

    assert sentence.startswith("Cannot get model: ")
    assert told in sentence


def test_a_file_behind_a_gate_is_told_as_one(hub: Hub, tmp_path: Path) -> None:
    hub.faults["config.json"] = repeat(Fault(403))

    assert f"config.json of {TINY} is gated" in refusal(hub, tmp_path)


@pytest.mark.parametrize("fault", [Fault(403), Fault(404), Fault(503), Fault(cut_after=0)])
def test_a_failure_where_the_hub_keeps_large_files_names_that_place(
    hub: Hub, tmp_path: Path, fault: Fault
) -> None:
    hub.faults[BIG] = repeat(fault)

    sentence = refusal(hub, tmp_path)

    assert f"{hub.url.replace('127.0.0.1', 'localhost')} " in sentence
    assert f"{BIG} of {TINY}" in sentence
    assert "gated" not in sentence


def test_without_a_network_the_hub_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(
            ModelFetchError, match=f"{url} cannot be reached .*HF_ENDPOINT"
        ) as failure:
            pull(TINY, tmp_path, endpoint=url, wait=lambda seconds: None)

    assert "Errno" not in str(failure.value)


@pytest.mark.parametrize("url", ["hub.example", "ftp://127.0.0.1"])
def test_an_address_that_is_none_is_told(tmp_path: Path, url: str) -> None:
    with pytest.raises(ModelFetchError, match="HF_ENDPOINT"):
        pull(TINY, tmp_path, endpoint=url, wait=lambda seconds: None)


def test_offline_means_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert "HF_HUB_OFFLINE is set" in refusal(hub, tmp_path)
    assert hub.requests == []


def test_pickles_alone_are_no_model(hub: Hub, tmp_path: Path) -> None:
    hub.repos[TINY] = {"config.json": b"{}", "weights.bin": b"a pickle"}

    assert "has no safetensors" in refusal(hub, tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.json", "/evil.json", "a/../../evil.json", "c:\\evil.json"]
)
def test_a_file_name_cannot_leave_the_folder(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.repos[TINY][name] = b"{}"

    assert "unsafe name" in refusal(hub, tmp_path / "models")
    assert list(tmp_path.rglob("evil.json")) == []


def test_too_small_a_disk_is_told_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    listing = hub.listing

    def huge(repo: str) -> dict[str, object]:
        found = listing(repo)
        for sibling in found["siblings"]:
            sibling["size"] = max(sibling["size"], 40_000_000_000 * ("lfs" in sibling))
        return found

    hub.listing = huge  # type: ignore
    with pytest.raises(NoSpaceError, match=r"needs 40.0 GB more in .*: 40.0 GB are missing"):
        fetched(hub, tmp_path)
    assert hub.served == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_up_is_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_full(self: Path, *args: object, **kwargs: object) -> object:
        return opened(Path("/dev/full") if self.name == BIG else self, *args, **kwargs)  # type: ignore

    monkeypatch.setattr(Path, "open", open_full)

    with pytest.raises(NoSpaceError, match="is full; received data is kept"):
        fetched(hub, tmp_path)


def test_a_folder_that_cannot_be_written_is_told(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")

    with pytest.raises(OutputNotWritableError, match=str(tmp_path / "models")):
        fetched(hub, tmp_path / "models")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v1.3", r"no model 'v1.3'; did you mean v1\.\d"),
        ("v1.1-difusers", "did you mean v1.1-diffusers?"),
        ("V9", "known are v1.0, v1.1,"),
        ("../evil", "no model '../evil'"),
        ("a/..", "no model"),
        ("", "no model ''"),
        ("stepfun-ai/Step1X-Edit", "choose v1.0 or v1.1"),
    ],
)
def test_an_unknown_name_says_which_are_known(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(InvalidParameterError, match=told):
        pull(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_model_of_the_catalog_is_found_by_its_name() -> None:
    for model in CATALOG:
        assert find_model(model.name.upper()) is model
    assert find_model("stepfun-ai/Step1X-Edit-v1p1-diffusers").name == "v1.1-diffusers"


def test_the_guide_lists_the_catalog() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    for model in CATALOG:
        size = model.published_bytes
        told = "reported by the hub" if size is None else f"{size / 1e9:.1f} GB"
        repos = " and ".join(f"`{repo}`" for repo in model.repos)
        assert f"| `{model.name}` | {repos} | {told} |" in guide


def test_what_the_reader_cannot_open_has_a_note() -> None:
    from step1x_edit.checkpoints.read import RELEASES

    assert {model.version for model in CATALOG if not model.note} == RELEASES.keys()


def test_model_path_may_be_a_path_or_the_name_of_a_pulled_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched(hub, tmp_path / "models")
    monkeypatch.chdir(tmp_path)

    assert resolve_model_path(None, tmp_path) is None
    assert resolve_model_path(TINY, tmp_path) == folder
    assert resolve_model_path(Path(TINY), tmp_path) == folder
    assert resolve_model_path(folder, tmp_path) == folder
    assert resolve_model_path("/no/such/folder", tmp_path) == Path("/no/such/folder")
    Path(TINY).mkdir(parents=True)  # what is there is meant
    assert resolve_model_path(TINY, tmp_path) == Path(TINY)
    for name in ("v1.1", "acme/other", "stepfun-ai/Step1X-Edit-v1p2"):
        with pytest.raises(CheckpointError, match=f"models pull {find_model(name).name}"):
            resolve_model_path(name, tmp_path)


# --- removing ------------------------------------------------------------------------------------


def test_a_model_is_removed_with_all_that_was_begun(hub: Hub, tmp_path: Path) -> None:
    fetched(hub, tmp_path)
    (tmp_path / "stranger").mkdir()
    partial(tmp_path).parent.mkdir()
    partial(tmp_path).write_bytes(b"begun")
    assert {kept.state for kept in kept_models(tmp_path)} == {"pulled", "partial"}

    assert remove_model(TINY, tmp_path) > len(WEIGHTS)

    assert kept_models(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["stranger"]
    with pytest.raises(InvalidParameterError, match="nothing to remove"):
        remove_model(TINY, tmp_path)


def test_a_removal_that_is_cut_short_leaves_no_half_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(path: Path, **options: object) -> None:
        if path.exists():
            (path / BIG).unlink()
            raise KeyboardInterrupt

    fetched(hub, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            remove_model(TINY, tmp_path)

    with pytest.raises(ModelFetchError, match="is not pulled"):
        find_pulled(TINY, tmp_path)
    assert kept_models(tmp_path) == []
    remove_model(TINY, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_model_is_not_removed_while_it_is_pulled(hub: Hub, tmp_path: Path) -> None:
    fetched(hub, tmp_path)

    with (
        FileLock(tmp_path / "acme--tiny.lock"),
        pytest.raises(ModelFetchError, match="another process"),
    ):
        remove_model(TINY, tmp_path)
    assert find_pulled(TINY, tmp_path).is_dir()
