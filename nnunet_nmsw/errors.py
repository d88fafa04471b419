"""Errors for people: one line that says what is wrong and what to do. One case's never stop the others."""

from __future__ import annotations

import re
import traceback
from typing import Any

from nnunet_nmsw.console import printable

LONGEST_REASON = 400
"""Characters of another library's error that are shown."""

ERRORS_FROM_OUTSIDE = (OSError, MemoryError, RuntimeError, ValueError)
"""What the machine and other libraries raise while a case is preprocessed, predicted or written: a full disk, too
little memory of host or device, a library that refuses the case. Every other type is an error of the code."""


def reason(error: BaseException) -> str:
    """What another library's error says, in one line, or its type if it says nothing.

    ITK and PyTorch say in the first line where something failed, and in the next ones what.
    """
    text = " ".join(str(error).split())
    text = re.sub(r"Exception thrown in SimpleITK \w+: \S+:\d+: ", "", text)
    text = re.sub(r"(ITK|sitk::) ?ERROR: (\w+\(0x[0-9a-f]+\): )?", "", text)
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    text = text or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 2].rsplit(" ", 1)[0] + " …"


class UserError(ValueError, SystemExit):
    """A setting, a file or a flag is wrong, and only the user can mend it.

    Being a `SystemExit`, it ends a command (nnU-Net's own commands included) with exit status 1 and its message alone,
    without a traceback; being a `ValueError`, it can be caught as one from Python.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
        self.code = printable(message)

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        """Between processes, as itself."""
        return UserError, (str(self),)


class Failures:
    """What failed for single cases of a run that goes on with the others.

    Attributes:
        lines: for people, one a failure.
        bugs: errors of the code itself. Their tracebacks have been printed.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bugs: list[Exception] = []

    def add(self, what: str, error: Exception) -> None:
        """Take note of a failure, and print it at once.

        Args:
            what: could not be done, such as "cannot predict case_001".
            error: why.
        """
        if isinstance(error, UserError):
            line = str(error)
        else:
            line = printable(f"{what}: {reason(error)}")
            if not isinstance(error, ERRORS_FROM_OUTSIDE):
                traceback.print_exception(error)
                traceback.clear_frames(error.__traceback__)  # which hold volumes and logits
                self.bugs.append(error)
        self.lines.append(line)
        print(line, flush=True)

    def raise_any(self, results: list[Any] | None = None) -> None:
        """Raise what has been noted, when all other cases are done.

        Args:
            results: of the other cases, for the attribute of this name of what is raised.

        Raises:
            UserError: cases failed, all of them for reasons from outside.
            Exception: the first error of the code itself.
        """
        raised = self.bugs[0] if self.bugs else UserError("; ".join(self.lines)) if self.lines else None
        if raised is not None:
            raised.results = results  # type: ignore[attr-defined]
            raise raised
