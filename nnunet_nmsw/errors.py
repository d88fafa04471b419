"""Errors for people: one line that says what is wrong and what to do."""

from nibabel.filebasedimages import ImageFileError

ERRORS_OF_A_CASE = (OSError, RuntimeError, ValueError, AssertionError, MemoryError, ImageFileError)
"""What readers and preprocessors raise for an image that they cannot take. Other cases go on."""


def reason(error: BaseException) -> str:
    """What another library's error says, in one line; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class UserError(ValueError, SystemExit):
    """A setting, a file or a flag is wrong, and only the user can mend it.

    Being a `SystemExit`, it ends a command (nnU-Net's own commands included) with exit status 1 and its message alone,
    without a traceback; being a `ValueError`, it can be caught as one from Python.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message
