"""The program `step1x-edit`, also as `python -m step1x_edit`.

Everything is imported inside `main`, so that Ctrl-C ends the program in the same way at any time.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from step1x_edit.interfaces import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
