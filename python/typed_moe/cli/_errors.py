"""The user's mistakes: one sentence on stderr and exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import typer


@final
class UserError(typer.TyperException):
    """Something that the user can put right; the message is the sentence that is printed."""

    exit_code = 2


@contextmanager
def user_errors(before: str = "") -> Iterator[None]:
    """Around a step that reads what the user gave: its refusals are the user's mistakes.

    ValueError and its kin (UnsupportedRouting, CheckpointError) and OSError; anything else is
    a mistake of ours and goes through.

    Args:
        before: what the sentence begins with.

    Raises:
        UserError: in place of those.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{before}{error}") from error
