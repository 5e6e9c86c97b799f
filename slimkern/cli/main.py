"""The command ``slimkern``: its commands, and errors as one line."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slimkern.cli.bench import bench
from slimkern.cli.demo import demo
from slimkern.cli.doctor import doctor
from slimkern.cli.inspect import inspect
from slimkern.cli.slim import slim

EXIT_ERROR = 2

# What a wrong argument, a missing file, a damaged folder or a missing package raise. Everything
# else is a defect of slimkern and shows its traceback.
USER_ERRORS = (ValueError, OSError, ImportError)
_EXTRA_OF = {
    "transformers": "hf",
    "accelerate": "hf",
    "jinja2": "demo",
    "matplotlib": "demo",
    "pandas": "demo",
    "pyarrow": "demo",
    "scipy": "demo",
}


class _OneLineErrors(TyperGroup):
    """A group of commands that reports a user's error in one line, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {sentence(error)}", err=True)
            raise typer.Exit(EXIT_ERROR) from None


def sentence(error: BaseException) -> str:
    """An exception as one line: what to do where a package is missing, its message otherwise."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    extra = _EXTRA_OF.get((missing or "").partition(".")[0])
    if extra is not None:
        return f"this command needs {missing}: pip install 'slimkern[{extra}]'"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _version(asked: bool) -> None:
    if asked:
        from slimkern import __version__

        typer.echo(f"slimkern {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="slimkern",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def slimkern(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Make transformers smaller, exactly, and then really faster."""


app.command()(inspect)
app.command()(slim)
app.command()(bench)
app.command()(demo)
app.command()(doctor)

if __name__ == "__main__":
    sys.exit(app())
