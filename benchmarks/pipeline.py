"""Whether any stage of a prediction waits: a folder of cases, against its slowest stage alone.

    python benchmarks/pipeline.py -m MODEL -i imagesTs -cases 10 --backend openvino -o docs/performance/pipeline.json

A process that has loaded the model predicts the folder as `nmsw_predict` does. In between, each stage does all cases
alone: reading with preprocessing, one case at a time; prediction with labels; writing. Seconds are medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from measuring import write_results

from nnunet_nmsw.inference.export import write_labels
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.selection.budget import parse_num_patches

STAGES = ("read and preprocess", "predict", "write")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, required=True, help="folder of an NMSW model")
    parser.add_argument("-i", type=Path, required=True, help="folder of images")
    parser.add_argument("-cases", type=int, default=10, help="images to predict, the first ones")
    parser.add_argument("-k", default="10%")
    parser.add_argument("-npp", type=int, default=3, help="threads that preprocess, as of nmsw_predict")
    parser.add_argument("-nps", type=int, default=3, help="threads that write, as of nmsw_predict")
    parser.add_argument("--backend", default="pytorch")
    parser.add_argument("-rounds", type=int, default=2)
    parser.add_argument("-o", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    predictor = NMSWPredictor(
        parse_num_patches(args.k, "-k", auto=True),
        use_mirroring=False,
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        allow_tqdm=False,
        backend=args.backend,
    )
    predictor.initialize_from_trained_model_folder(str(args.m), (0,))
    images = [[str(file)] for file in sorted(args.i.glob("*_0000*"))[: args.cases]]
    runs: list[dict[str, float]] = []
    for _ in range(args.rounds + 1):  # the first one converts for OpenVINO, and fills caches
        with tempfile.TemporaryDirectory() as folder:
            runs.append({**stages(predictor, images, Path(folder)), "all": together(predictor, images, folder, args)})
        print(runs[-1], flush=True)
    seconds = {name: median(run[name] for run in runs[1:]) for name in runs[0]}
    slowest = max(STAGES, key=seconds.__getitem__)
    ratio = seconds["all"] / seconds[slowest]
    print(f"{seconds['all']:.1f} s is {ratio:.2f} times the slowest stage, {slowest}")
    write_results(args.o, {"seconds": seconds, "slowest": slowest, "ratio": ratio, "runs": runs[1:]})


def stages(predictor: NMSWPredictor, images: list[list[str]], folder: Path) -> dict[str, float]:
    """Seconds of each stage for all cases, one stage after the other for each of them."""
    seconds = dict.fromkeys(STAGES, 0.0)
    folds = predictor.folds()  # made once, as for a run over cases
    cases = predictor.preprocess(images, None, None, 0)
    for number in range(len(images)):
        times = [time.perf_counter()]
        case = next(cases)
        times.append(time.perf_counter())
        labels, _ = predictor.case_model(lambda _: folds).labels(case)
        times.append(time.perf_counter())
        file = folder / f"{number}{predictor.dataset_json['file_ending']}"
        write_labels(labels, file, predictor.plans_manager, case["data_properties"])
        times.append(time.perf_counter())
        for name, start, end in zip(STAGES, times, times[1:], strict=False):
            seconds[name] += end - start
    return seconds


def together(predictor: NMSWPredictor, images: list[list[str]], folder: str, args: argparse.Namespace) -> float:
    """Seconds of the whole folder."""
    start = time.perf_counter()
    outputs = [f"{folder}/together_{number}" for number in range(len(images))]
    predictor.predict_from_files(
        images,
        outputs,
        num_processes_preprocessing=args.npp,
        num_processes_segmentation_export=args.nps,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
