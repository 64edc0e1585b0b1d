"""`python -m step1x_edit.interfaces.cli`: the command line without an installed script."""

from step1x_edit.interfaces.cli import main

main()
