"""Trainings that run to their end: arms × folds × datasets, each NMSW arm compared with stock by `nmsw_compare`.

    python experiments/study.py -d 731 -arms stock nmsw context retrofit -epochs 50 -o study -device cpu -jobs 2

Fold S is trained with seed S: a replicate differs in its cases, too, and every case counts once. Arms that start from
a stock model take the one of their own fold. `lowres` is stock nnU-Net at about the resolution of the global branch;
with `stock` it also makes two stock models without further training. What is there is kept: an interrupted study goes
on, a training after its last whole epoch. `--minutes` stops in time. In the end tables are written into `study.md` of
the folder. Needs nnU-Net's folders and the preprocessed datasets of `ablation.py`.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbones import BACKBONES, UNET, write_plans
from grid import DATASETS, STOCK
from study_runs import ARMS, LOWRES, TWO_STOCK, Study
from study_tables import table

STEPS = 250
"""Of an epoch, as in nnU-Net."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, nargs="+", default=[4, 902, 731], choices=DATASETS, help="datasets")
    parser.add_argument("-arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("-backbone", default=UNET, choices=BACKBONES, help="network of both branches")
    parser.add_argument("-folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-epochs", type=int, required=True, help="of a training")
    parser.add_argument("-start_epochs", type=int, help="of the models that retrofits start from. Default: -epochs")
    parser.add_argument("-steps", type=int, default=STEPS, help="of an epoch")
    parser.add_argument("-jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--minutes", type=float, help="stop after these. The same command goes on where it stopped")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="folder of models, reports and tables")
    args = parser.parse_args()
    study = Study(args)
    for dataset_id in args.d:
        dataset = DATASETS[dataset_id]
        for name in args.arms:
            source = dataset.low_plans if ARMS[name].is_low else dataset.plans
            write_plans(dataset, study.plans_of(dataset, name), ARMS[name].settings, source, args.backbone)
    # Fold by fold, so that there is a result early; what others start from comes first.
    for started in (False, True):
        names = [name for name in args.arms if (ARMS[name].start is not None) is started]
        runs = [(d, name, fold) for fold in args.folds for d in args.d for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: study.train(*run), runs))
    reports = [(d, name) for d in args.d for name in args.arms if name not in (STOCK, LOWRES)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda of: study.compare(of[0], of[1], args.folds), reports))
        others = [(d, name, fold) for fold in args.folds for d in args.d for name in (LOWRES, *TWO_STOCK)]
        list(pool.map(lambda of: study.predict(*of), others))
    text = "\n\n".join(table(study, DATASETS[d], args.arms) for d in args.d)
    (args.o / f"study{study.backbone}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
