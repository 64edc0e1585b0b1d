#!/usr/bin/env bash
# safetensors 0.8.0 writes the metadata of a file in another order at each call: the same tensors and the same metadata,
# saved twice in one process, are two files with different bytes and hashes.
#
# Guess: the header is JSON with the tensors sorted, so equal input gives an equal file, as it does without metadata.
# Observed: with eight entries of metadata, 20 calls of `save` in one process gave 20 different files. They differ in
# nothing but the order of the entries of `__metadata__`: all have one length, and read back they are equal. So a hash of
# a LoRA or of a checkpoint that carries metadata does not tell whether two builds are the same.
# Exits with 1 if a newer version behaves differently.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.2.6

"$folder/venv/bin/python" - <<'PYTHON'
import json

import numpy as np
from safetensors.numpy import load, save

tensors = {name: np.arange(4, dtype=np.float32) for name in "abc"}
metadata = {f"key{number}": str(number) for number in range(8)}


def headers(files):
    """The headers, as JSON."""
    return [json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]) for file in files]


plain = [save(tensors) for _ in range(20)]
noted = [save(tensors, metadata) for _ in range(20)]
print(f"without metadata: {len(set(plain))} different file(s) of 20")
print(f"with metadata: {len(set(noted))} different file(s) of 20")
print("one length:", len({len(file) for file in noted}) == 1)
print("equal headers, but for their order:", all(each == headers(noted)[0] for each in headers(noted)))
assert len(set(plain)) == 1
assert len(set(noted)) > 1
assert all((load(file)["a"] == tensors["a"]).all() for file in noted)
PYTHON
