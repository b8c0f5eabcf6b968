"""The one exception that is the user's to mend: the command line prints it as one line and exits with 2."""


class UserError(Exception):
    """Says what came, what was expected and what to do, in one line."""


class TrainingStoppedError(UserError):
    """A step that would do harm was not taken. `good_step`: of the last checkpoint whose average was good; None in phase 1."""

    def __init__(self, message: str, good_step: int | None):
        super().__init__(message)
        self.good_step = good_step
