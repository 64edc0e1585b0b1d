#!/usr/bin/env bash
# openapi-python-client 0.29.1 generates a module that cannot be imported.
#
# Guess: an operation whose body is required and comes as a form or as JSON becomes a function that
# takes either of two classes. Observed: the template loses "required" in its loop, annotates the
# body with `| Unset` and does not import Unset unless the operation has an optional parameter, so
# importing the module raises NameError. With an optional header the same operation can be imported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check openapi-python-client==0.29.1
env/bin/python - <<'PYTHON'
import importlib.metadata
import json
import subprocess
import sys

print("openapi-python-client", importlib.metadata.version("openapi-python-client"))


def schema(name):
    return {"schema": {"type": "object", "title": name, "properties": {"a": {"type": "string"}}}}


def outcome(parameters):
    operation = {
        "operationId": "create",
        "tags": ["things"],
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": schema("Form"), "application/json": schema("Json")},
        },
        "responses": {"204": {"description": "done"}},
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "t", "version": "1"},
        "paths": {"/things": {"post": operation}},
    }
    with open("document.json", "w", encoding="utf-8") as file:
        json.dump(document, file)
    with open("config.json", "w", encoding="utf-8") as file:
        json.dump({"post_hooks": []}, file)
    command = "openapi_python_client generate --path document.json --config config.json"
    flags = "--meta none --overwrite --fail-on-warning --output-path made"
    subprocess.run([sys.executable, "-m", *command.split(), *flags.split()], check=True)
    done = subprocess.run(
        [sys.executable, "-c", "import made.api.things.create"], capture_output=True, text=True
    )
    return (done.stderr.strip().splitlines() or ["imported"])[-1]


header = {"name": "X-Key", "in": "header", "required": False, "schema": {"type": "string"}}
plain, with_header = outcome([]), outcome([header])
print("two kinds of a required body:      ", plain)
print("the same with an optional header:  ", with_header)
sys.exit(not (plain.startswith("NameError") and with_header == "imported"))
PYTHON
