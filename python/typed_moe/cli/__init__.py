"""The command line, `typed-moe`. typer and rich are imported in here and nowhere else."""

from typed_moe.cli._app import main

__all__ = ["main"]
