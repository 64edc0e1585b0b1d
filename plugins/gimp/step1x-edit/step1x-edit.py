#!/usr/bin/env python3
"""A plug-in for GIMP 3: edits the picture by saying what to change, on a server of step1x-edit.

Copy the folder `step1x-edit` into a folder of GIMP's *Preferences, Folders, Plug-ins*, and make
this file executable. The plug-in is *Filters, Edit by Instruction*. The result becomes a new layer;
if something is selected, only that may change. The server is at STEP1X_EDIT_URL, or at
http://localhost:8000; its key, if it has one, is taken from STEP1X_EDIT_API_KEY.
"""

import io
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import gi

gi.require_version("Gimp", "3.0")
gi.require_version("GimpUi", "3.0")
from gi.repository import Gimp, GimpUi, Gio, GLib, GObject  # noqa: E402

NAME = "plug-in-step1x-edit"
TIMEOUT_S = 3600
QUIET = Gimp.RunMode.NONINTERACTIVE


class Step1XEdit(Gimp.PlugIn):
    """The plug-in: one procedure."""

    def do_set_i18n(self, name):
        return False

    def do_query_procedures(self):
        return [NAME]

    def do_create_procedure(self, name):
        procedure = Gimp.ImageProcedure.new(self, name, Gimp.PDBProcType.PLUGIN, self.run, None)
        procedure.set_image_types("*")
        procedure.set_menu_label("Edit by Instruction…")
        procedure.add_menu_path("<Image>/Filters")
        procedure.set_documentation(
            "Edit the picture by saying what to change",
            "Sends the visible picture, and the selection as a mask, to a server of step1x-edit.",
            name,
        )
        procedure.set_attribution("The step1x-edit authors", "Apache-2.0", "2026")
        kept = GObject.ParamFlags.READWRITE
        procedure.add_string_argument("prompt", "_Prompt", "What to change", "", kept)
        procedure.add_int_argument(
            "num-steps", "_Steps", "More steps take longer", 10, 50, 28, kept
        )
        procedure.add_double_argument(
            "guidance-scale", "_Guidance", "How closely to follow the prompt", 1, 15, 6, kept
        )
        return procedure

    def run(self, procedure, run_mode, image, _drawables, config, _data):
        if run_mode == Gimp.RunMode.INTERACTIVE and not asked(procedure, config):
            return procedure.new_return_values(Gimp.PDBStatusType.CANCEL, GLib.Error())
        fields = {
            "prompt": config.get_property("prompt"),
            "num_steps": config.get_property("num-steps"),
            "guidance_scale": config.get_property("guidance-scale"),
        }
        try:
            edit(image, fields)
        except EditError as error:
            failure = GLib.Error.new_literal(Gimp.PlugIn.error_quark(), str(error), 0)
            return procedure.new_return_values(Gimp.PDBStatusType.EXECUTION_ERROR, failure)
        return procedure.new_return_values(Gimp.PDBStatusType.SUCCESS, GLib.Error())


class EditError(Exception):
    """An edit that failed, with the sentence for the user."""


def asked(procedure, config):
    """Whether the user has filled the dialog and did not cancel it."""
    GimpUi.init(NAME)
    dialog = GimpUi.ProcedureDialog.new(procedure, config, "Edit by Instruction")
    dialog.fill(None)
    is_filled = dialog.run()
    dialog.destroy()
    return is_filled


def edit(image, fields):
    """Add a layer with the edited picture, in one step for *Undo*; raises EditError."""
    Gimp.progress_init("Editing: " + fields["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        files = {"file": saved(flat(image), folder)}
        if not Gimp.Selection.is_empty(image):
            files["mask"] = saved(selection(image), folder)
        result = Path(folder) / "result.png"
        result.write_bytes(post("/api/edit", fields, files))
        image.undo_group_start()
        try:
            layer = Gimp.file_load_layer(QUIET, image, Gio.File.new_for_path(str(result)))
            layer.set_name(fields["prompt"])
            image.insert_layer(layer, None, 0)
        finally:
            image.undo_group_end()
    Gimp.displays_flush()


def flat(image):
    """A copy of the picture as it looks, with its transparency."""
    copy = image.duplicate()
    copy.merge_visible_layers(Gimp.MergeType.CLIP_TO_IMAGE)
    return copy


def selection(image):
    """A grey picture of the selection: white may change."""
    mask = Gimp.Image.new(image.get_width(), image.get_height(), Gimp.ImageBaseType.GRAY)
    mask.insert_layer(Gimp.Layer.new_from_drawable(image.get_selection(), mask), None, 0)
    return mask


def saved(image, folder):
    """The bytes of a picture as PNG; deletes the picture."""
    path = Path(folder) / "picture.png"
    try:
        if not Gimp.file_save(QUIET, image, Gio.File.new_for_path(str(path)), None):
            raise EditError("The picture could not be saved as PNG")
        return path.read_bytes()
    finally:
        image.delete()


def post(path, fields, files):
    """The body of the server's answer to a form; raises EditError with the server's sentence."""
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
        raise EditError(sentence(error)) from None
    except OSError as error:
        raise EditError(f"No step1x-edit answers at {url}: {error}") from None


def sentence(error):
    """What the server says about a request that failed."""
    try:
        return json.load(error)["detail"]
    except (ValueError, KeyError):
        return f"The server answered {error.code}"


Gimp.main(Step1XEdit.__gtype__, sys.argv)
