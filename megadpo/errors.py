"""The one exception for a user's mistake, and why something else failed, in a few words."""

from typing import Any

from megadpo.secrets.redact import redact


class UserError(Exception):
    """Something the user can put right: one clear sentence naming the field, the value, and what to do.

    The command line prints it as ``megadpo: error: …`` and exits with status 2, without a traceback. Secrets in it are
    hidden.
    """

    def __init__(self, *words: Any) -> None:
        super().__init__(*(redact(word) if isinstance(word, str) else word for word in words))


def reason(error: BaseException, limit: int | None = 200) -> str:
    """The message of an exception on one line, or its type where it has none.

    Args:
        limit: the most characters; None: all.
    """
    return " ".join(redact(str(error)).split())[:limit] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, where the rest is a trace of another program; its type if it has none."""
    message = redact(str(error)).strip()
    return message.splitlines()[0][:200] if message else type(error).__name__
