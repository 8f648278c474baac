"""Run `locat` as `python -m locat`."""

from locat.command import main

main()
