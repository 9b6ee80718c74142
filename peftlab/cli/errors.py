"""What the command line says when the fault lies in what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input; printed as one line, exit status 2."""


class Diverged(UserError):
    """The loss is no longer a number."""


class Broken(Exception):
    """A promised equality did not hold; printed as one line, exit status 1."""


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turn the errors that the library raises for bad values into a UserError that begins with `what`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{what}: {text}") from error
