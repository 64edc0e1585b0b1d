"""MCP over stdio: `python3 mcp_server.py`. Every byte on stdout is protocol, from the first on."""

import gc
import os

gc.disable()  # imports leave no garbage; `serve` enables it again

# Whatever is printed from here on must not reach the client.
_wire = os.dup(1)
os.dup2(2, 1)

import sys  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

_FOLDER = Path(__file__).resolve().parent
_VENV = _FOLDER / ".venv"
_VENV_PYTHON = _VENV / "bin" / "python"

if __name__ == "__main__" and find_spec("step1x_edit") is None:
    # MCP clients start the system's python3, while `make setup` installs into .venv.
    if not _VENV_PYTHON.exists() or Path(sys.prefix) == _VENV:
        sys.exit(f"step1x-edit is not installed: run `make setup` in {_FOLDER}")
    os.dup2(_wire, 1)
    os.execv(_VENV_PYTHON, [str(_VENV_PYTHON), *sys.argv])  # noqa: S606

from step1x_edit.interfaces.mcp.server import build_mcp  # noqa: E402
from step1x_edit.interfaces.mcp.stdio import main, start  # noqa: E402
from step1x_edit.service.wiring import build_service  # noqa: E402

if __name__ == "__main__":
    main(_wire)
else:  # `fastmcp run mcp_server.py` and the like look for the server by this name
    sys.stdout.flush()
    os.dup2(_wire, 1)
    gc.enable()
    mcp = build_mcp(build_service(start()))
