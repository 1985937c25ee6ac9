"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, what was found and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
