"""`step1x-edit batch`: what it does, what it does again, and what it leaves when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from typer.testing import CliRunner

from fakes import FakeWorker
from http_server import until
from step1x_edit.interfaces.cli import app
from step1x_edit.schemas.answers import KEPT
from step1x_edit.service.batches import JOURNAL_NAME

HERE = Path(__file__).parents[1]
run = CliRunner()
QUICK = ["--num-steps", "10", "--seed", "1"]

pytestmark = pytest.mark.usefixtures("fake_model")


@pytest.fixture
def folder(tmp_path: Path, photo: Path) -> Path:
    """A folder with five pictures that differ, and with what is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for shift, name in enumerate("abcde"):
        Image.fromarray(np.roll(np.asarray(Image.open(photo)), shift, axis=1)).save(
            folder / f"{name}.png"
        )
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"no picture either")
    return folder


def edited(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != JOURNAL_NAME)


def in_folder(*flags: str) -> list[str]:
    return ["batch", "in", "--prompt", "invert", *QUICK, *flags]


def test_the_pictures_of_a_folder_are_edited_into_a_folder_beside_it(folder: Path) -> None:
    result = run.invoke(app, in_folder())

    results = folder.with_name("in_edited")
    assert result.exit_code == 0, result.stderr
    assert edited(results) == [f"{name}_edited.png" for name in "abcde"]
    assert result.stdout.splitlines() == [str(results / name) for name in edited(results)]
    for name in "abcde":
        before, after = (
            Image.open(folder / f"{name}.png"),
            Image.open(results / f"{name}_edited.png"),
        )
        assert np.array_equal(np.asarray(after), 255 - np.asarray(before))


def test_pictures_of_phones_in_a_folder_are_edited_too(folder: Path) -> None:
    pillow_heif.from_pillow(Image.open(folder / "a.png")).save(folder / "phone.HEIC")

    run.invoke(app, in_folder())

    with Image.open(folder.with_name("in_edited") / "phone_edited.png") as result:
        assert result.size == Image.open(folder / "a.png").size


def test_again_it_does_only_what_is_missing(folder: Path, worker: FakeWorker) -> None:
    run.invoke(app, in_folder())
    Path("in_edited/b_edited.png").unlink()
    (folder / "f.png").write_bytes((folder / "a.png").read_bytes())
    before = {path: path.stat().st_mtime_ns for path in Path("in_edited").glob("*.png")}
    worker.started.clear()

    result = run.invoke(app, in_folder("--json"))

    assert len(worker.started) == 2
    answer = json.loads(result.stdout)
    assert answer["summary"] == {"total": 6, "successes": 6, "failures": 0}
    kept = [item["result"]["message"].startswith("Kept") for item in answer["results"]]
    assert kept == [True, False, True, True, True, False]
    assert (
        before.items()
        <= {path: path.stat().st_mtime_ns for path in Path("in_edited").glob("*.png")}.items()
    )


@pytest.mark.parametrize("flags", [["--prompt", "other"], ["--seed", "2"], ["--num-steps", "11"]])
def test_with_another_prompt_or_parameter_it_is_done_again(
    folder: Path, worker: FakeWorker, flags: list[str]
) -> None:
    run.invoke(app, in_folder())
    worker.started.clear()

    result = run.invoke(app, in_folder(*flags))

    assert result.exit_code == 0, result.stderr
    assert len(worker.started) == 5
    assert len(edited(folder.with_name("in_edited"))) == 5


def test_a_picture_that_has_changed_is_done_again(folder: Path, worker: FakeWorker) -> None:
    run.invoke(app, in_folder())
    (folder / "a.png").write_bytes((folder / "c.png").read_bytes())
    worker.started.clear()

    result = run.invoke(app, in_folder())

    assert result.exit_code == 0, result.stderr
    assert len(worker.started) == 1
    assert np.array_equal(
        np.asarray(Image.open("in_edited/a_edited.png")),
        255 - np.asarray(Image.open(folder / "c.png")),
    )


def test_a_file_that_it_has_not_made_is_left_alone_unless_told_otherwise(folder: Path) -> None:
    run.invoke(app, in_folder())
    foreign = Path("in_edited/c_edited.png")
    foreign.write_bytes(b"somebody has painted this over")

    refused = run.invoke(app, in_folder())
    kept = foreign.read_bytes()
    replaced = run.invoke(app, in_folder("--overwrite"))

    assert refused.exit_code == 1
    assert "Output already exists" in refused.stderr
    assert kept == b"somebody has painted this over"
    assert replaced.exit_code == 0, replaced.stderr
    assert foreign.read_bytes() != kept


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
@pytest.mark.parametrize("output", ["x.png", ""])
def test_an_output_that_cannot_be_read_is_refused_before_the_edit(
    folder: Path, worker: FakeWorker, output: str
) -> None:
    (folder / "list.csv").write_text(f"image,prompt,output\na.png,x,{output}\n")
    results = folder / "list_edited"
    results.mkdir()
    (results / (output or "a_edited.png")).symlink_to("nowhere.png")

    result = run.invoke(app, ["batch", "in/list.csv", *QUICK])

    assert result.exit_code == 1
    assert "Output already exists" in result.stderr
    assert worker.started == []
    assert not (results / JOURNAL_NAME).exists()


def assert_both_are_kept(worker: FakeWorker) -> None:
    """Run the manifest again: nothing is edited."""
    worker.started.clear()

    result = run.invoke(app, ["batch", "in/list.csv", "--json", *QUICK])

    assert result.exit_code == 0, result.stdout
    results = [item["result"] for item in json.loads(result.stdout)["results"]]
    assert [one["message"] for one in results] == [KEPT, KEPT]
    assert worker.started == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_finished_results_in_a_read_only_folder_are_kept(folder: Path, worker: FakeWorker) -> None:
    (folder / "list.csv").write_text("image,prompt,output\na.png,x,x.png\nb.png,x,\n")
    run.invoke(app, ["batch", "in/list.csv", *QUICK])
    (folder / "list_edited").chmod(0o500)

    assert_both_are_kept(worker)


def test_a_finished_result_that_a_later_line_edits_further_is_kept(
    folder: Path, worker: FakeWorker
) -> None:
    (folder / "list.csv").write_text(
        "image,prompt,output\na.png,x,x.png\nlist_edited/x.png,y,y.png\n"
    )
    run.invoke(app, ["batch", "in/list.csv", *QUICK])

    assert_both_are_kept(worker)


def test_results_among_the_pictures_are_not_edited_again(folder: Path) -> None:
    for _ in range(2):
        result = run.invoke(app, in_folder("--output-dir", "in"))

    assert result.exit_code == 0, result.stderr
    assert len(list(folder.glob("[!.]*.png"))) == 10


def test_a_manifest_says_for_each_picture_what_to_do(folder: Path, worker: FakeWorker) -> None:
    (folder / "list.csv").write_text(
        "image,prompt,output,seed,num_steps\n"
        "a.png,make it night,,,\n"
        "a.png,,sub/x.jpg,7,12\n"
        f'{folder / "b.png"},"snow, please",,,\n'
    )

    result = run.invoke(app, ["batch", "in/list.csv", "--prompt", "fog", "--json", *QUICK])

    assert result.exit_code == 0, result.stdout
    results = [item["result"] for item in json.loads(result.stdout)["results"]]
    made = [
        (item["metadata"]["prompt"], item["metadata"]["seed"], item["metadata"]["num_steps"])
        for item in results
    ]
    assert made == [("make it night", 1, 10), ("fog", 7, 12), ("snow, please", 1, 10)]
    there = folder / "list_edited"
    assert [item["output_path"] for item in results] == [
        str(there / "a_edited.png"),
        str(there / "sub" / "x.jpg"),
        str(there / "b_edited.png"),
    ]


def test_what_the_model_is_to_think_is_a_flag_and_a_column(
    folder: Path, worker: FakeWorker
) -> None:
    worker.model = "v1.2"
    (folder / "list.csv").write_text(
        "image,thinking,reflection\na.png,,\nb.png,false,true\nc.png,,maybe\n"
    )
    words = ["batch", "in/list.csv", "--prompt", "x", "--thinking", *QUICK]

    wrong = run.invoke(app, words)
    (folder / "list.csv").write_text("image,thinking,reflection\na.png,,\nb.png,false,true\n")
    done = run.invoke(app, words)
    again = run.invoke(app, [*words, "--json"])

    assert "list.csv line 4: reflection must be true or false, got 'maybe'" in wrong.stderr
    assert done.exit_code == 0, done.stderr
    assert "line 2: a.png: rewritten prompt: x, and nothing else" in done.stderr
    assert "line 3: b.png: round 2 (best): score 9, success: The hat fits." in done.stderr
    assert "line 3: b.png: rewritten" not in done.stderr
    results = [item["result"] for item in json.loads(again.stdout)["results"]]
    assert [one["message"].startswith("Kept") for one in results] == [True, True]
    thoughts = [one["metadata"]["reasoning"] for one in results]
    assert [one.get("prompt") for one in thoughts] == ["x, and nothing else", None]


def test_the_most_rounds_are_a_flag_and_a_column(folder: Path, worker: FakeWorker) -> None:
    worker.model = "v1.2"
    (folder / "list.csv").write_text("image,reflection_rounds\na.png,\nb.png,3\n")
    words = ["batch", "in/list.csv", "--prompt", "x", "--reflection", *QUICK]

    done = run.invoke(app, [*words, "--reflection-rounds", "1", "--json"])

    assert done.exit_code == 0, done.stderr
    results = [item["result"] for item in json.loads(done.stdout)["results"]]
    assert [len(one["metadata"]["reasoning"]["rounds"]) for one in results] == [1, 2]


def test_home_is_understood_in_every_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "list.csv").write_text("image,prompt,output\n~/in/a.png,x,\nb.png,x,~/out/o.png\n")

    result = run.invoke(app, ["batch", "~/in/list.csv", "--output-dir", "~/out", *QUICK])

    assert result.exit_code == 0, result.stderr
    out = folder.with_name("out")
    assert result.stdout.splitlines() == [str(out / "a_edited.png"), str(out / "o.png")]


def test_the_home_of_somebody_unknown_is_a_name_like_others(folder: Path) -> None:
    words = ["batch", "in", "--prompt", "x", "--output-dir", "~nobody-of-this-name", *QUICK]

    result = run.invoke(app, words)

    assert result.exit_code == 0, result.stderr
    assert len(edited(folder.with_name("~nobody-of-this-name"))) == 5


def test_a_manifest_may_be_lines_of_json(folder: Path) -> None:
    rows = [{"image": "a.png", "prompt": "x"}, {"image": "b.png", "prompt": "y", "seed": 5}]
    (folder / "list.jsonl").write_text("\n\n".join(map(json.dumps, rows)))

    result = run.invoke(app, ["batch", "in/list.jsonl", "--json", *QUICK])

    items = json.loads(result.stdout)["results"]
    assert [item["result"]["metadata"]["seed"] for item in items] == [1, 5]


BAD_MANIFESTS = [
    ("l.csv", "image,prompt\na.png,x\n,y\n", "line 3: image is missing"),
    ("l.csv", "image,prompt,seed\na.png,x,many\n", "line 2: seed must be a whole number"),
    ("l.csv", "image,prompt\na.png,x,y\n", "line 2: it has more cells than the first line"),
    ("l.csv", "image,promt\na.png,x\n", "line 2: prompt is missing; 'promt' is unknown"),
    ("l.csv", 'image,prompt\n"a\n.png",x\n"b.png\n', "is not CSV"),
    ("l.csv", "picture,prompt\na.png,x\n", "the first line must name the columns"),
    ("l.csv", "image,prompt\n", "no lines with pictures"),
    ("l.csv", "image,prompt,output\na.png,x,o.png\nb.png,y,o.png\n", "line 3: the output is that"),
    ("l.csv", "image,prompt,output\na.png,x,o.txt\n", "line 2: output must end in .png"),
    ("l.csv", b"image,prompt\n\xff.png,x\n", "save it as UTF-8 (in Excel: CSV UTF-8)"),
    ("l.csv", b"\xff\xfei\0m\0a", "save it as UTF-8 (in Excel: CSV UTF-8)"),
    ("l.csv", "image,prompt,Image\na.png,x,b.png\n", "the first line names 'image' twice"),
    ("l.csv", "image;prompt\na.png;x;y\n", "line 2: it has more cells than the first line"),
    ("l.jsonl", '{"image": "a.png", "prompt": " "}\n', "line 1: prompt is empty"),
    ("l.jsonl", '{"image": "a.png", "prompt": "x"}\n\n{"image":\n', "line 3: it is not JSON"),
    ("l.jsonl", '["a.png"]\n', "line 1: it is not a JSON object"),
    pytest.param("l.jsonl", "[" * 100_000, "line 1: it is not JSON", id="deep"),
    ("l.jsonl", '{"image": "a.png"}\n', "line 1: prompt is missing"),
    ("l.txt", "a.png\n", "must be a folder, or a manifest that ends in .csv or .jsonl"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_MANIFESTS)
def test_bad_lines_are_named_before_anything_is_done(
    folder: Path, worker: FakeWorker, name: str, text: str | bytes, message: str
) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    result = run.invoke(app, ["batch", f"in/{name}", *QUICK])

    assert result.exit_code == 2
    assert result.stderr.startswith("Invalid parameter: ")
    assert message in result.stderr
    assert worker.started == []
    assert not list(folder.glob("*_edited"))


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["in"], 2, "--prompt is missing"),
        (["empty", "--prompt", "x"], 1, "there are no pictures in this folder"),
        (["missing", "--prompt", "x"], 2, "must be a folder, or a manifest"),
        (["missing.csv"], 2, "cannot be read"),
        (["in", "--prompt", "x", "--num-steps", "5"], 2, "num_steps must be"),
        (["in", "--prompt", "x", "--mask", ""], 2, "mask must"),
        (["~nobody-of-this-name/in", "--prompt", "x"], 2, "must be a folder, or a manifest"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_calls_are_told(folder: Path, words: list[str], exit_code: int, message: str) -> None:
    Path("empty").mkdir()

    result = run.invoke(app, ["batch", *words])

    assert result.exit_code == exit_code
    assert message in result.stderr


def test_one_picture_that_fails_does_not_stop_the_others_and_is_tried_again(
    folder: Path, worker: FakeWorker
) -> None:
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:100])

    first = run.invoke(app, in_folder())
    (folder / "b.png").write_bytes(whole)
    worker.started.clear()
    second = run.invoke(app, in_folder())

    assert first.exit_code == 1
    assert "4 succeeded, 1 failed" in first.stderr
    assert second.exit_code == 0
    assert len(worker.started) == 1


def test_a_journal_that_was_cut_short_is_gone_on_with(folder: Path, worker: FakeWorker) -> None:
    run.invoke(app, in_folder())
    journal = Path("in_edited") / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-30])
    Path("in_edited/e_edited.png").unlink()
    worker.started.clear()

    results = [run.invoke(app, in_folder()) for _ in range(2)]

    assert [result.exit_code for result in results] == [0, 0]
    assert len(worker.started) == 1


def test_a_kill_between_the_journal_and_the_result_loses_nothing(
    folder: Path, worker: FakeWorker
) -> None:
    run.invoke(app, in_folder())
    first = {path: path.read_bytes() for path in Path("in_edited").glob("*.png")}
    run.invoke(app, in_folder("--seed", "2"))
    for path, data in first.items():  # as if the second run had not come to replace it
        path.write_bytes(data)
    worker.started.clear()

    result = run.invoke(app, in_folder("--seed", "2"))

    assert result.exit_code == 0, result.stderr
    assert len(worker.started) == 5
    assert all(path.read_bytes() != data for path, data in first.items())


class Killable:
    """The batch in a separate process; see cli_fake.py."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "edits.log"
        self.log.touch()

    def begun(self) -> int:
        return len(self.log.read_text().splitlines())

    def start(self, **settings: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        return subprocess.Popen(
            [sys.executable, str(HERE / "cli_fake.py"), *in_folder()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FAKE_LOG": str(self.log), "PYTHONPATH": paths, **settings},
            # A shell's background job, as a test run may be, ignores Ctrl-C and bequeaths that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def to_its_end(self) -> str:
        process = self.start()
        stdout, log = process.communicate(timeout=240)
        assert process.returncode == 0, log
        return stdout


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_batch_loses_at_most_the_picture_in_flight(folder: Path, tmp_path: Path) -> None:
    batch = Killable(tmp_path)
    process = batch.start(FAKE_HANG="3", FAKE_DEAF="1")
    until(lambda: batch.begun() == 3)
    process.kill()
    process.communicate()
    finished = {path: path.read_bytes() for path in (tmp_path / "in_edited").glob("*.png")}

    printed = batch.to_its_end()

    assert len(finished) == 2
    assert batch.begun() == 3 + 3  # the one in flight and those that had not begun
    assert len(printed.splitlines()) == 5
    assert all(path.read_bytes() == data for path, data in finished.items())
    batch.to_its_end()
    assert batch.begun() == 6


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_batch_with_130_and_leaves_what_is_finished(
    folder: Path, tmp_path: Path
) -> None:
    batch = Killable(tmp_path)
    process = batch.start(FAKE_HANG="3", FAKE_DEAF="1")
    until(lambda: batch.begun() == 3)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=240)

    assert process.returncode == 130
    assert "continues from there" in log
    assert "Traceback" not in log
    assert edited(tmp_path / "in_edited") == ["a_edited.png", "b_edited.png"]
    assert len(batch.to_its_end().splitlines()) == 5
    assert batch.begun() == 6


SPREADSHEETS = [
    ("Image;Prompt;Guidance_Scale\na.png;make it night;2.5\n", "utf-8-sig"),  # Excel in Europe
    ("image\tprompt\tguidance_scale\na.png\tmake it night\t2.5\n", "utf-16"),  # "Unicode text"
    ("IMAGE, Prompt ,guidance_scale\na.png,make it night,2.5\n", "utf-8"),
    ('"image";"prompt";"guidance_scale"\r\n"a.png";"make it night";"2.5"\r\n', "utf-16-be-bom"),
    ("image,prompt,guidance_scale\na.png,make it night,2.5\n", "utf-16-le"),  # without a mark
    ("image,prompt,guidance_scale\na.png,make it night,2.5\n", "utf-16-be"),
]


@pytest.mark.parametrize(("text", "encoding"), SPREADSHEETS)
def test_a_table_is_read_as_spreadsheets_write_it(
    folder: Path, worker: FakeWorker, text: str, encoding: str
) -> None:
    data = b"\xfe\xff" + text.encode("utf-16-be") if "bom" in encoding else text.encode(encoding)
    (folder / "list.csv").write_bytes(data)

    result = run.invoke(app, ["batch", "in/list.csv", "--json", *QUICK])

    assert result.exit_code == 0, result.stdout
    (item,) = json.loads(result.stdout)["results"]
    assert worker.started == ["make it night"]
    assert item["result"]["metadata"]["guidance_scale"] == 2.5


def test_lines_of_json_may_be_in_utf_16(folder: Path, worker: FakeWorker) -> None:
    text = json.dumps({"image": "a.png", "prompt": "夜にする"}, ensure_ascii=False)
    (folder / "list.jsonl").write_text(text, encoding="utf-16")

    result = run.invoke(app, ["batch", "in/list.jsonl", *QUICK])

    assert result.exit_code == 0, result.stderr
    assert worker.started == ["夜にする"]
