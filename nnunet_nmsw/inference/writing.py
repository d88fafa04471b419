"""Cases predicted one after the other, and written by threads while the next ones are predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nnunet_nmsw.errors import Failures
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.inference.cases import Case


class Done(NamedTuple):
    """A predicted case.

    Attributes:
        result: gives what a caller from Python gets.
        write: writes the case's files into a folder, under a name without ending.
        then: what else is done with a case that is written.
    """

    result: Callable[[], Any]
    write: Callable[[Path, str], None]
    then: Callable[[], None] | None = None


class Writing(NamedTuple):
    """How cases are written.

    Attributes:
        ending: of the file of labels.
        num_writers: threads that write.
        progress_bar: show one over cases.
    """

    ending: str
    num_writers: int
    progress_bar: bool


def done_one_after_the_other(
    cases: Iterable[Case], predict: Callable[[Case], Done], free: Callable[[], None], how: Writing
) -> list[Any]:
    """Predict cases, and write those that have an output file, each whole, the labels last.

    A case that fails is reported, and the others go on.

    Args:
        cases: preprocessed.
        predict: predicts one.
        free: frees memory of the device after a failure.
        how: they are written.

    Returns:
        For each case None where it was written, else its result.

    Raises:
        UserError: cases have failed, see `Failures.raise_any`.
    """
    failures = Failures()
    results: list[Any] = []
    writing: dict[Future[Any], str] = {}

    def collect(at_most: int) -> None:
        while len(writing) > at_most:
            done, _ = wait(writing, return_when=FIRST_COMPLETED)
            for job in done:
                what, error = writing.pop(job), job.exception()
                if isinstance(error, Exception):
                    failures.add(what, error)

    total = len(cases) if isinstance(cases, Sized) else None
    bar = tqdm(total=total, desc="cases", disable=not how.progress_bar, position=1, leave=False)
    with bar, ThreadPoolExecutor(how.num_writers, "writing") as writers:
        for case in cases:
            results.append(None)
            if "error" in case:
                failures.add(case["what"], case["error"])
                bar.update()
                continue
            file = case["ofile"]
            try:
                done = predict(case)
                if file is None:
                    results[-1] = done.result()
            except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the case's fault
                failures.add(f"cannot predict {file or 'an array'}", error)
                free()
                bar.update()
                continue
            if file is not None:
                collect(how.num_writers - 1)  # results must not pile up before a slow disk
                writing[writers.submit(_write, file, how.ending, done.write)] = f"cannot write {file}{how.ending}"
                if done.then is not None:
                    try:
                        done.then()
                    except Exception as error:  # noqa: BLE001 - see above
                        failures.add(f"cannot hand on {file}", error)
            del done  # which holds the labels or the logits
            bar.update()
        collect(0)
    failures.raise_any(results)
    return results


def _write(file: str, ending: str, write: Callable[[Path, str], None]) -> None:
    """Write all files of a case, the labels last: where they are, a continued prediction leaves the case out."""
    path = Path(file)
    with written_whole(path.parent, last=path.name + ending) as folder:
        write(folder, path.name)
