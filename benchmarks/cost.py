"""Where the time of a prediction goes: against the volume's size, the number of classes and the number of patches.

    # models: see synthetic.py
    python benchmarks/cost.py -m MODEL_3 MODEL_30 MODEL_118 -device cpu -o docs/performance/cost.json

One image of 0.8 mm in a file to labels in a file, without mirroring, one step after the other, although the commands
preprocess and write beside the prediction. Python's start and the loading of the model are not counted. Each
measurement is a process of its own. Sizes and numbers of patches are measured with the model in the middle. Draws the
JSON as stacked bars, into an SVG beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measuring import in_new_process, tell, write_results
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from synthetic import organs, write
from torch import Tensor

from nnunet_nmsw.inference.export import write_labels
from nnunet_nmsw.inference.memory import most_memory_of_process
from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import preprocessed
from nnunet_nmsw.inference.volume import Networks, Padded, Spending
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import CoarsePrediction, Selector, WindowChoice
from nnunet_nmsw.volume.windows import WindowGrid

STOCK = "nnU-Net"
STAGES = ("read and preprocess", "global branch", "choice of windows", "patches", "labels", "write")
IMAGE_SPACING, ORGANS = 0.8, 29
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, nargs="+", help="folders of NMSW models for different numbers of classes")
    parser.add_argument("-edge", type=int, nargs="+", default=[100, 200, 300, 400], help="voxels of the cubic images")
    parser.add_argument("-edge_of_classes", type=int, default=240, help="of the image for the numbers of classes")
    parser.add_argument("-k", nargs="+", default=["2%", "5%", "10%", "20%", "50%", "all"])
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="JSON file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        model, edge, method = args.one
        tell(measure(Path(model), int(edge), method, torch.device(args.device)))
        return
    if args.m:
        write_results(args.o, {"rows": list(rows(args))}, torch.device(args.device))
    plot(json.loads(args.o.read_text())["rows"], args.o.with_suffix(".svg"))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All measurements: a question each, and what is varied in it."""
    middle, edge, k = args.m[len(args.m) // 2], args.edge[len(args.edge) // 2], "10%"
    runs = [("size", middle, edge, method) for edge in args.edge for method in (STOCK, k)]
    runs += [("classes", model, args.edge_of_classes, method) for model in args.m for method in (STOCK, k)]
    runs += [("patches", middle, edge, method) for method in args.k]
    known: dict[tuple[Path, int, str], dict[str, Any]] = {}
    for question, model, edge, method in runs:
        run = (model, edge, method)
        if run not in known:
            flags = ["-device", args.device, "-o", str(args.o), "--one", *map(str, run)]
            known[run] = in_new_process(__file__, *flags)
        row = {"question": question, "edge": edge, "method": method, **known[run]}
        print(row, flush=True)
        yield row


class Stages:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Count what happens inside."""
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


class TimedFold(Fold):
    """Counts the seconds of its networks."""

    stages: Stages

    def coarse(self, padded: Padded) -> CoarsePrediction:
        """See the parent."""
        with self.stages.of("global branch"):
            return super().coarse(padded)

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """See the parent."""
        with self.stages.of("patches"):
            return super().patches(padded, coarse, starts_K3)


class TimedSelector:
    """Counts the seconds of a choice of windows."""

    def __init__(self, selector: Selector, stages: Stages) -> None:
        self.selector, self.stages, self.name = selector, stages, selector.name

    def choose(self, coarse: CoarsePrediction, grid: WindowGrid, budget: Budget) -> WindowChoice:
        """See `Selector`."""
        with self.stages.of("choice of windows"):
            return self.selector.choose(coarse, grid, budget)


class TimedPredictor(NMSWPredictor):
    """Counts the seconds of its stages."""

    stages: Stages

    @property
    def spending(self) -> Spending:
        """See the parent."""
        spending = super().spending
        return spending._replace(selector=TimedSelector(spending.selector, self.stages))

    def networks_of(self, case: dict[str, Any]) -> list[Networks]:
        """See the parent."""
        folds: list[Networks] = []
        for fold in self.folds():
            folds.append(TimedFold(fold.ensemble, fold.number))
            folds[-1].stages = self.stages
        return folds


def measure(model: Path, edge: int, method: str, device: torch.device) -> dict[str, Any]:
    """Classes, seconds by stage, and GiB of the process at its peak."""
    stages, of_both = Stages(), {"use_mirroring": False, "device": device, "allow_tqdm": False}
    predictor = nnUNetPredictor(**of_both) if method == STOCK else TimedPredictor(method, **of_both)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    classes = predictor.label_manager.num_segmentation_heads
    with tempfile.TemporaryDirectory() as folder:
        image, output = Path(folder, "case_0000.nii.gz"), str(Path(folder, "case"))
        write(organs([edge] * 3, 3, 0, ORGANS)[0], image, IMAGE_SPACING)
        run: Callable[..., None] = of_nnunet if method == STOCK else of_nmsw
        run(predictor, str(image), output, stages)
    seconds = {stage: stages.seconds[stage] for stage in STAGES}
    return {"classes": classes, "seconds": seconds, "gib": most_memory_of_process() / 2**30}


def of_nmsw(predictor: TimedPredictor, image: str, output: str, stages: Stages) -> None:
    """From file to file with NMSW."""
    predictor.stages = stages
    with stages.of(STAGES[0]):
        case = preprocessed(predictor, [image], None, output)
    with stages.of("labels"):
        segmentation = predictor.predict_segmentation(case["data"], case["data_properties"])
    stages.seconds["labels"] -= sum(
        stages.seconds[stage] for stage in ("global branch", "choice of windows", "patches")
    )
    with stages.of("write"):
        write_labels(segmentation, Path(output + ".nii.gz"), predictor.plans_manager, case["data_properties"])


def of_nnunet(predictor: nnUNetPredictor, image: str, output: str, stages: Stages) -> None:
    """From file to file with nnU-Net: its export writes the labels, too."""
    plans, configuration, dataset = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    with stages.of(STAGES[0]):
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case([image], None, plans, configuration, dataset)
    with stages.of("patches"):
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    with stages.of("labels"):
        export_prediction_from_logits(logits, properties, configuration, plans, dataset, output)


def plot(measured: list[dict[str, Any]], file: Path) -> None:
    """Stacked bars, a row for each way to predict."""
    names = {"size": "million voxels", "classes": "classes", "patches": "patches, share of windows"}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, question in enumerate(names):
        for line, stock in enumerate((True, False)):
            axis = axes[line, column]
            bars = [row for row in measured if row["question"] == question and (row["method"] == STOCK) == stock]
            if not bars:
                axis.axis("off")
                continue
            labels = [bar_name(row) for row in bars]
            bottom = [0.0] * len(bars)
            for stage, colour in zip(STAGES, COLOURS, strict=True):
                heights = [row["seconds"][stage] for row in bars]
                axis.bar(labels, heights, bottom=bottom, color=colour, label=stage)
                bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
            axis.bar_label(
                axis.containers[-1],
                [f"{total:.3g} s" if total > 10 else f"{total:.1f} s" for total in bottom],
                padding=2,
                fontsize=8,
            )
            axis.set_ylim(top=1.12 * max(bottom))
            axis.set_xlabel(names[question])
            axis.set_ylabel("seconds")
            method = "nnU-Net" if stock else "NMSW" if question == "patches" else "NMSW, K = 10%"
            axis.set_title(f"{method}, by {question}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    axes[0, 2].legend(handles[::-1], labels[::-1], loc="center", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def bar_name(row: dict[str, Any]) -> str:
    """What is varied."""
    by_question = {"size": f"{row['edge'] ** 3 / 1e6:.0f}", "classes": str(row["classes"]), "patches": row["method"]}
    return by_question[row["question"]]


if __name__ == "__main__":
    main()
