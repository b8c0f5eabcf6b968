"""The one exception that is the user's to mend: the command line prints it as one line and exits with 2."""


class UserError(Exception):
    """Says what came, what was expected and what to do, in one line."""
