"""``python -m mljobs``: the command, where its script is not on the PATH."""

from mljobs.cli import main

main()
