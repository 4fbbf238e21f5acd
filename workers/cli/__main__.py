"""`python -m workers.cli`: the same as `fleet`."""

from workers.cli.app import main

main()
