#!/usr/bin/env bash
# The stdio server of mcp 2.3.0 never answers a request that holds half of a surrogate pair.
#
# Guess: the escape of half a pair is valid JSON (RFC 8259), and JSON.stringify writes it for a text that was cut
# inside an emoji, so the request is answered, at worst with an error that has its id. Observed: no answer and no error;
# the requests before and after it are answered. A client waits for its own limit, and without one it waits forever.
# Exits with 1 if a newer version behaves differently.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mcp==2.3.0

cat > "$folder/server.py" <<'PYTHON'
from mcp.server.mcpserver import MCPServer

server = MCPServer("echo")


@server.tool()
def echo(text: str) -> str:
    """Give the text back."""
    return text


server.run("stdio")
PYTHON

"$folder/venv/bin/python" - "$folder/server.py" <<'PYTHON'
import importlib.metadata
import json
import subprocess
import sys

server = subprocess.Popen(
    [sys.executable, sys.argv[1]],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
)


def send(**message):
    server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    server.stdin.flush()


def call(number, text):
    send(id=number, method="tools/call", params={"name": "echo", "arguments": {"text": text}})


def answered():
    return json.loads(server.stdout.readline())["id"]


client = {"name": "finding", "version": "1"}
send(
    id=0,
    method="initialize",
    params={"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client},
)
ids = [answered()]
send(method="notifications/initialized")
call(1, "whole")
ids.append(answered())
call(2, "cut \ud83c")  # json.dumps writes an escape, as JSON.stringify does
call(3, "whole again")
ids.append(answered())
server.stdin.close()
ids += [json.loads(line)["id"] for line in server.stdout]
server.wait(30)

print("mcp", importlib.metadata.version("mcp"))
print("requests sent: [0, 1, 2, 3]; answered:", ids)
raise SystemExit(ids != [0, 1, 3])
PYTHON
