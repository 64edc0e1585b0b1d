"""Edit a picture and store a job with the client that openapi-python-client generates.

python generated_python.py URL KEY PHOTO; the folder `generated` is expected in the working folder.
It writes the results as JSON. It runs in the environment of the generator, without step1x-edit.
"""

import importlib
import io
import json
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

import generated
from generated.api.editing import edit_picture
from generated.api.stored_jobs import create_job, get_job
from generated.models import (
    CreateJobFilesPictureRequest,
    EditPicturePictureRequest,
    EditPicturePictureRequestSizeLevel,
    JobAnswer,
    Problem,
)
from generated.types import File

modules = [found.name for found in pkgutil.walk_packages(generated.__path__, "generated.")]
for name in modules:
    importlib.import_module(name)

url, key, photo = sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes()
client = generated.AuthenticatedClient(base_url=url, token=key)


def upload() -> File:
    return File(payload=io.BytesIO(photo), file_name="photo.png", mime_type="image/png")


edited = edit_picture.sync_detailed(
    client=client,
    body=EditPicturePictureRequest(
        file=upload(), prompt="x", seed=7, size_level=EditPicturePictureRequestSizeLevel.VALUE_512
    ),
)
assert isinstance(edited.parsed, File)
Path("edited.png").write_bytes(edited.parsed.payload.read())

refused = edit_picture.sync(
    client=client, body=EditPicturePictureRequest(file=upload(), prompt="x", num_steps=5)
)
assert isinstance(refused, Problem)

created = create_job.sync(
    client=client, body=CreateJobFilesPictureRequest(file=upload(), prompt="x", num_steps=10)
)
assert isinstance(created, JobAnswer)
found = get_job.sync(created.id, client=client)
assert isinstance(found, JobAnswer)

sys.stdout.write(
    json.dumps(
        {
            "modules": len(modules),
            "seed": edited.headers["x-seed"],
            "refused": [error.field for error in refused.errors or []],
            "job": found.request.prompt,
        }
    )
)
