"""What commands print, and how they end: on Ctrl-C and SIGTERM in one line, with nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker process looks whether its parent is still there."""

ENDING = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signals that end a command, and what it says then."""

unfinished_folders: set[Path] = set()
"""Folders of files that this process has begun and not finished, see `files.written_whole`."""


at_end: list[Callable[[], None]] = []
"""What else is done when a signal ends the command, after its workers are gone: cleaning up behind these."""


def printable(text: str) -> str:
    """A text that every terminal takes: a file name that is not UTF-8 is shown with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def end_in_one_line(hint: str = "") -> None:
    """From now on, end this process on Ctrl-C or SIGTERM: one line, no traceback, no workers, no unfinished files.

    The exit status is 130 or 143. That happens between two operations of the main thread, hence after the batch that
    runs. Threads that read or write are not waited for: what they write has no name yet.

    Args:
        hint: what remains and how to go on, printed behind "interrupted".
    """
    for number, word in ENDING.items():
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell does for what runs in the background
            signal.signal(number, partial(_end_now, word + hint))
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_end_as_usual)


def _hold_signals() -> None:
    """Before a fork: a signal that came between it and `_end_as_usual` would be forgotten by Python.

    nnU-Net's pools terminate workers that have hardly started, and wait for them for ever if they do not end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _end_as_usual() -> None:
    """In a forked worker, which is not the command: it ends when it is told to, without a word."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, usual)
    _release_signals()


def kill_children_of(process: int) -> list[psutil.Process]:
    """Kill what a process has started, and what these have: workers that would wait for ever. Returns all of them."""
    try:
        children = psutil.Process(process).children(recursive=True)
    except psutil.Error:  # it is gone itself
        return []
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    return children


def _end_now(line: str, number: int, _frame: FrameType | None) -> None:
    """Kill workers, remove unfinished files, and leave without waiting for threads."""
    try:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)
        children = kill_children_of(os.getpid())
        for folder in list(unfinished_folders):
            shutil.rmtree(folder, ignore_errors=True)
        psutil.wait_procs(children, timeout=1)
        for clean_up in at_end:
            clean_up()
        with suppress(RuntimeError, OSError, ValueError):  # it was printing just now, or who listened is gone
            sys.stdout.flush()
        # A progress bar may stand in the last line.
        os.write(2, f"{os.linesep}{line}{os.linesep}".encode())
    finally:  # whatever went wrong: the command has been told to end
        os._exit(128 + number)


def follow_parent() -> None:
    """Let this worker process end when its parent is gone, killed for example: it would wait for work for ever."""
    started_by = multiprocessing.parent_process()
    # Not always the one that the system calls so: a fork server, or nobody's, if it went while this process imported.
    parent = os.getppid() if started_by is None or started_by.pid is None else started_by.pid

    def look() -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(parent)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=look, name="follow parent", daemon=True).start()
