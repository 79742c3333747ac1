"""The typer application: commands are functions of the modules beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from framequilt.cli import ask, calibrate, chat, convert, doctor, inspect

app = typer.Typer(
    name="framequilt",
    help="Questions about video, answered by quantized vision-language models on your machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import framequilt

        print(f"framequilt {framequilt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Questions about video, answered by quantized vision-language models on your machine."""


app.command("convert")(convert.command)
app.command("calibrate")(calibrate.command)
app.command("ask")(ask.command)
app.command("chat")(chat.command)
app.command("inspect")(inspect.command)
app.command("doctor")(doctor.command)
