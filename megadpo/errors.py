"""The one exception for a user's mistake."""


class UserError(Exception):
    """Something the user can put right: one clear sentence naming the field, the value, and what to do.

    The command line prints it as ``megadpo: error: …`` and exits with status 2, without a traceback.
    """
