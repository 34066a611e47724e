"""`python -m tqc`: the command line."""

from tqc.cli import main

main()
