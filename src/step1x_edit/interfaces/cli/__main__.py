"""`python -m step1x_edit.interfaces.cli`: the command line where no script is installed."""

from step1x_edit.interfaces.cli import main

main()
