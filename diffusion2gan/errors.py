"""The one exception that is the user's to mend: the command line prints it as one line and exits with 2."""

REASON_LENGTH = 160


class UserError(Exception):
    """Says what came, what was expected and what to do, in one line."""


class TrainingStoppedError(UserError):
    """A step that would do harm was not taken. `good_step`: of the last checkpoint whose average was good; None in phase 1."""

    def __init__(self, message: str, good_step: int | None):
        super().__init__(message)
        self.good_step = good_step


def in_one_line(error: BaseException) -> str:
    """What another library's exception says, to be quoted in a message: one line of at most `REASON_LENGTH` characters; its class where it
    says nothing."""
    text = " ".join(str(error).split())
    if len(text) > REASON_LENGTH:
        text = text[: REASON_LENGTH - 4].rpartition(" ")[0] or text[: REASON_LENGTH - 4]
        text += " ..."
    return text or type(error).__name__
