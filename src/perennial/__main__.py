"""`python -m perennial` is the command line."""

from perennial.cli import main

main()
