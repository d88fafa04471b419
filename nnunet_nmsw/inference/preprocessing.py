"""Cases of a prediction, preprocessed while others are predicted.

In threads of this process: reading, decompressing and resampling leave Python's lock alone, and a process of its own
would take seconds and half a gigabyte to import nnU-Net.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from nnunetv2.inference.data_iterators import PreprocessAdapter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_nmsw.errors import ERRORS_OF_A_CASE, UserError, reason
from nnunet_nmsw.inference.resampling import InferenceConfiguration

Case = dict[str, Any]
"""What nnU-Net's data iterators give: `data`, `data_properties` and `ofile`; or `error`, why it is not there."""


def preprocessed_cases(
    predictor: nnUNetPredictor,
    images: list[list[str]],
    previous_stage: list[str] | None,
    outputs: list[str] | None,
    num_threads: int,
) -> Iterator[Case]:
    """Cases in their order, preprocessed as a predictor's plans say.

    Args:
        predictor: whose cases they are.
        images: files by case and channel.
        previous_stage: for the cascade, the file of each case.
        outputs: for each case, the file to be written, without ending.
        num_threads: that preprocess; as many cases are held, ready or not, beside the one that was asked for last. With
            0, each is preprocessed when it is asked for.
    """
    previous: list[Any] = previous_stage if previous_stage is not None else [None] * len(images)
    files: list[Any] = outputs if outputs is not None else [None] * len(images)
    left = list(zip(images, previous, files, strict=True))[::-1]
    if num_threads == 0:
        while left:
            yield preprocessed(predictor, *left.pop())
        return
    with ThreadPoolExecutor(num_threads, "preprocessing") as threads:
        ahead: deque[Future[Case]] = deque()
        try:
            while left or ahead:
                while left and len(ahead) < num_threads:
                    ahead.append(threads.submit(preprocessed, predictor, *left.pop()))
                yield ahead.popleft().result()
        finally:  # whoever asked may have had enough
            for waiting in ahead:
                waiting.cancel()


def preprocessed(predictor: nnUNetPredictor, images: list[str], previous_stage: str | None, output: str | None) -> Case:
    """One case."""
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=predictor.verbose_preprocessing)
    faster = InferenceConfiguration(
        configuration, predictor.device, previous_stage is not None or not is_stock(preprocessor)
    )
    arguments = (preprocessor, [output], predictor.plans_manager, predictor.dataset_json, faster)
    try:
        case: Case = next(PreprocessAdapter([images], [previous_stage], *arguments))
    except ERRORS_OF_A_CASE as error:
        return {"error": UserError(f"cannot preprocess {', '.join(images)}: {reason(error)}")}
    case["data"] = case["data"].to(dtype=torch.float32, memory_format=torch.contiguous_format)
    return case


def is_stock(preprocessor: DefaultPreprocessor) -> bool:
    """Whether a preprocessor does with a case what nnU-Net's does."""
    return all(
        getattr(type(preprocessor), name) is getattr(DefaultPreprocessor, name) for name in ("run_case", "run_case_npy")
    )
