"""The command `framequilt`: convert, ask, chat, inspect, doctor. Each has `--json`.

Exit codes: 0 fine, 1 an error (code, cause and hint on standard error), 2 wrong usage, 130 Ctrl-C.
Answers and JSON go to standard output, everything else to standard error.
"""


def main() -> None:
    """Entry point of the installed command."""
    from framequilt.cli.app import app

    app(prog_name="framequilt")
