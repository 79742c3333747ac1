"""`python -m framequilt.cli` is the command `framequilt`."""

from framequilt.cli import main

main()
