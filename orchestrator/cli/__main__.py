"""`python -m orchestrator.cli`: the same as the program `stagecraft`."""

from orchestrator.cli import main

main()
