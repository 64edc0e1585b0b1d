"""`python -m step1x_edit`: the command line if no script is installed."""

from step1x_edit.interfaces.cli import main

main()
