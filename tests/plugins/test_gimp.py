"""The plug-in for GIMP, with a stand-in for the few calls of GIMP that it makes."""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image

from conftest import MakeService
from http_server import TOKEN, serving

FILE: Final = Path(__file__).parents[2] / "plugins" / "gimp" / "step1x-edit" / "step1x-edit.py"


class GimpImage:
    """A picture of GIMP: its layers, the topmost first, and what is selected."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.layers: list[Any] = []
        self.selected = Image.new("L", self.size)
        self.undo: list[str] = []
        self.is_deleted = False

    def get_width(self) -> int:
        return self.size[0]

    def get_height(self) -> int:
        return self.size[1]

    def get_selection(self) -> Image.Image:
        return self.selected

    def duplicate(self) -> GimpImage:
        copy = GimpImage(*self.size)
        copy.layers = list(self.layers)
        return copy

    def merge_visible_layers(self, _: object) -> None:
        self.layers = self.layers[:1]

    def insert_layer(self, layer: object, _: None, position: int) -> None:
        self.layers.insert(position, layer)

    def undo_group_start(self) -> None:
        self.undo.append("start")

    def undo_group_end(self) -> None:
        self.undo.append("end")

    def delete(self) -> None:
        self.is_deleted = True


class GimpLayer:
    """A layer of GIMP."""

    def __init__(self, pixels: Image.Image) -> None:
        self.pixels = pixels
        self.name = ""

    def set_name(self, name: str) -> None:
        self.name = name


class GimpProcedure:
    """What GIMP shows of the plug-in, and its answer."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.arguments: dict[str, tuple[object, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("add_") and name.endswith("_argument"):
            return lambda key, *described: self.arguments.__setitem__(key, described)
        return lambda *_: None

    def new_return_values(self, status: object, error: object) -> tuple[object, object]:
        return status, error


class Config(dict[str, Any]):
    """The parameters of a call."""

    def get_property(self, name: str) -> Any:
        return self[name]


class Status(enum.Enum):
    SUCCESS = 0
    CANCEL = 1
    EXECUTION_ERROR = 2


def save(_: object, image: GimpImage, path: str, __: None) -> bool:
    """GIMP's export of the topmost layer."""
    layer = image.layers[0]
    (layer.pixels if isinstance(layer, GimpLayer) else layer).save(path)
    return True


def load(_: object, __: GimpImage, path: str) -> GimpLayer:
    """GIMP's way to open a file as a layer."""
    with Image.open(path) as picture:
        return GimpLayer(picture.copy())


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in, as GIMP loads it."""

    def with_parts(**parts: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(**parts)

    def new_procedure(_: object, __: str, ___: object, run: Any, ____: None) -> GimpProcedure:
        return GimpProcedure(run)

    gimp = with_parts(
        PlugIn=type("PlugIn", (), {"error_quark": staticmethod(lambda: 1), "__gtype__": None}),
        RunMode=with_parts(INTERACTIVE=0, NONINTERACTIVE=1),
        PDBProcType=with_parts(PLUGIN=0),
        PDBStatusType=Status,
        MergeType=with_parts(CLIP_TO_IMAGE=0),
        ImageBaseType=with_parts(GRAY=1),
        ImageProcedure=with_parts(new=new_procedure),
        Image=with_parts(new=lambda width, height, _: GimpImage(width, height)),
        Layer=with_parts(new_from_drawable=lambda channel, _: channel),
        Selection=with_parts(is_empty=lambda image: image.selected.getbbox() is None),
        file_save=save,
        file_load_layer=load,
        progress_init=lambda _: True,
        displays_flush=lambda: None,
        main=lambda *_: None,
    )
    error = type("Error", (Exception,), {"new_literal": staticmethod(lambda *all: all[1])})
    repository = with_parts(
        Gimp=gimp,
        GimpUi=with_parts(),
        Gio=with_parts(File=with_parts(new_for_path=str)),
        GLib=with_parts(Error=error),
        GObject=with_parts(ParamFlags=with_parts(READWRITE=3)),
    )
    monkeypatch.setitem(sys.modules, "gi", with_parts(require_version=lambda *_: None))
    monkeypatch.setitem(sys.modules, "gi.repository", repository)
    spec = importlib.util.spec_from_file_location("plug_in", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Step1XEdit()


def opened(pixels: np.ndarray[Any, Any]) -> GimpImage:
    image = GimpImage(pixels.shape[1], pixels.shape[0])
    image.layers.append(GimpLayer(Image.fromarray(pixels)))
    return image


def called(plug_in: Any, image: GimpImage, **parameters: Any) -> tuple[Status, Any]:
    """The status and the error of one call without a dialog."""
    (name,) = plug_in.do_query_procedures()
    procedure = plug_in.do_create_procedure(name)
    config = Config({"prompt": "night", "num-steps": 10, "guidance-scale": 6.0, **parameters})
    status, error = procedure.run(procedure, 1, image, [], config, None)
    return status, error


def test_the_result_is_a_new_layer_and_one_step_to_undo(
    plug_in: Any, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    image = opened(pixels)

    with serving(make_service()) as url:
        monkeypatch.setenv("STEP1X_EDIT_URL", url)
        monkeypatch.setenv("STEP1X_EDIT_API_KEY", TOKEN)
        status, _ = called(plug_in, image)

    result, original = image.layers
    assert status is Status.SUCCESS
    assert result.name == "night"
    assert (np.asarray(result.pixels) == 255 - pixels).all()  # the worker of the tests inverts
    assert (np.asarray(original.pixels) == pixels).all()
    assert image.undo == ["start", "end"]


def test_only_the_selection_changes(
    plug_in: Any, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    image = opened(pixels)
    image.selected.paste(255, (16, 0, 32, 32))

    with serving(make_service(), api_key=None) as url:
        monkeypatch.setenv("STEP1X_EDIT_URL", url)
        called(plug_in, image)

    edited = np.asarray(image.layers[0].pixels)
    assert (edited[:, :16] == 200).all()
    assert (edited[:, 24:] == 55).all()


def test_an_error_is_the_server_s_sentence_and_adds_no_layer(
    plug_in: Any, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = opened(np.zeros((24, 24, 3), np.uint8))

    with serving(make_service(), api_key=None) as url:
        monkeypatch.setenv("STEP1X_EDIT_URL", url)
        refused = called(plug_in, image, **{"num-steps": 9})
    monkeypatch.setenv("STEP1X_EDIT_URL", "http://127.0.0.1:1")
    missed = called(plug_in, image)

    assert refused[0] is missed[0] is Status.EXECUTION_ERROR
    assert "num_steps must be between 10 and 50" in refused[1]
    assert missed[1].startswith("No step1x-edit answers at http://127.0.0.1:1")
    assert len(image.layers) == 1


def test_its_parameters_have_the_ranges_of_the_server(plug_in: Any) -> None:
    from step1x_edit.schemas.requests import EditRequest

    arguments = plug_in.do_create_procedure("plug-in-step1x-edit").arguments
    known = EditRequest.model_json_schema()["properties"]

    for name, (_, _, lowest, highest, default, _) in list(arguments.items())[1:]:
        ranges = known[name.replace("-", "_")]
        assert (lowest, highest) == (ranges["minimum"], ranges["maximum"])
        assert default == ranges["default"]
