"""`python -m tqc`: the command line."""

from tqc.cli.app import main

main()
