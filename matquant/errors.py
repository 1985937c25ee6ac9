"""Errors for the user, and lists of names in their messages."""

from collections.abc import Sequence


class UserError(Exception):
    """Error that the user can fix: the message says what was wrong, what was found and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """First ``limit`` names in one string, with the number of the others: ``a, b, c and 4 more``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
