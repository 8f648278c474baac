"""`python -m locat`."""

from locat.command import main

main()
