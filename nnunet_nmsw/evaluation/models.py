"""The trained models of a comparison, and the validation cases of their folds."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_nmsw.documents import SPLITS, SUMMARY, read_json
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.flags import DEFAULT_MAX_DROP
from nnunet_nmsw.inference.model_folder import checked_folder, read_configuration, read_document
from nnunet_nmsw.model.by_trainer import predicts_benefits
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.model.safe_loading import read_checkpoint
from nnunet_nmsw.model.weights import digest_of_weights
from nnunet_nmsw.selection.calibration import calibration_files, threshold_of_folds
from nnunet_nmsw.settings import PLANS_KEY

DEFAULT_BASELINE = "nnUNetTrainer"
SPLITS_FILE = "splits_final.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """A folder that training left: one model a fold.

    Attributes:
        role: "baseline" or "nmsw".
        folder: the model folder, with plans.json and fold_X.
        trainer: name of the trainer.
        checkpoint: file name of the checkpoints.
        trusted: let checkpoints and plans run code, see `nnunet_nmsw.model.safe_loading`.
    """

    role: str
    folder: Path
    trainer: str
    checkpoint: str
    trusted: bool = False

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the model folder."""
        return read_document(self.folder, name)

    @property
    def name(self) -> str:
        """For people."""
        return self.folder.name

    @property
    def plans(self) -> PlansManager:
        """Of its folder."""
        return PlansManager(self.json("plans.json"))

    @property
    def num_patches(self) -> int | str:
        """K that the model is set to."""
        num_patches: int | str = self.configuration[PLANS_KEY]["num_patches"]
        return num_patches

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the model's plans that it was trained with, inheritance resolved."""
        return read_configuration(self.folder, self.folder.name.split("__")[-1])

    @property
    def predicts_benefits(self) -> bool:
        """Whether it can decide on its number of patches."""
        return predicts_benefits(self.trainer, settings_of(self.configuration))

    def checkpoint_file(self, fold: int) -> Path:
        """The checkpoint of a fold."""
        return self.folder / f"fold_{fold}" / self.checkpoint

    def validation_summary(self, fold: int) -> Path:
        """What nnU-Net's validation of a fold leaves."""
        return self.folder / f"fold_{fold}" / "validation" / "summary.json"

    def calibrated_folds(self) -> set[int]:
        """The folds whose validation has calibrated the number of patches "auto", but for fold "all", which has trained
        on every case."""
        names = {file.parts[-3].removeprefix("fold_") for file in calibration_files(self.folder)}
        return {int(name) for name in names - {"all"}}

    def calibrating_folds(self, fold: int) -> list[int]:
        """The folds that set the threshold of the number of patches "auto" for a fold's cases: the others, if any is
        calibrated, or the threshold would be set on the cases that are measured."""
        return sorted(self.calibrated_folds() - {fold}) or [fold]

    def threshold(self, fold: int) -> float:
        """What the mean of the score map over a window has to exceed, with the number "auto", in a fold's cases.

        Raises:
            UserError: neither the fold nor another one is calibrated.
        """
        return threshold_of_folds(self.folder, self.calibrating_folds(fold), DEFAULT_MAX_DROP)

    def fingerprints(self, folds: Sequence[int]) -> dict[str, str]:
        """Digest of each fold's weights: results of another training must not be mixed with these.

        Not of the file: a validation later writes its calibration into it.
        """
        return {f"{self.role}, fold {fold}": digest_of_weights(self._weights(fold)) for fold in folds}

    def _weights(self, fold: int) -> dict[str, Any]:
        return dict(read_checkpoint(self.checkpoint_file(fold), self.trusted, mmap=True)["network_weights"])


@dataclasses.dataclass(frozen=True)
class Case:
    """A validation case of a fold.

    Attributes:
        name: identifier.
        fold: the fold it was held out of.
        images: its image files, one a channel.
        reference: its label file.
        has_reference: the file is there before the comparison; else it is what the reference method predicts.
    """

    name: str
    fold: int
    images: tuple[str, ...]
    reference: str
    has_reference: bool = True


def dataset_name(dataset: str) -> str:
    """nnU-Net's name of a dataset given by name or number.

    Raises:
        UserError: nnU-Net's folders are not set, or there is no such dataset.
    """
    for name, path in (
        ("nnUNet_raw", nnUNet_raw),
        ("nnUNet_preprocessed", nnUNet_preprocessed),
        ("nnUNet_results", nnUNet_results),
    ):
        if not path.is_set():
            raise UserError(f"{name} is not set: export it as for nnU-Net")
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"-d {dataset}: no such dataset under nnUNet_raw, nnUNet_preprocessed or nnUNet_results"
        ) from error
    assert isinstance(name, str)
    return name


def find_models(args: argparse.Namespace, dataset: str) -> list[Model]:
    """The NMSW model, and the baseline where it is named or where `nnUNetTrainer` has trained all of the folds.

    Raises:
        UserError: a model or a fold of it is not there, or the two do not have the same labels and channels.
    """
    nmsw = Model("nmsw", checked_folder(_folder(dataset, args.tr, args.p, args.c)), args.tr, args.chk, args.trust_model)
    if "downsampling_factor" not in nmsw.configuration.get(PLANS_KEY, {}):
        raise UserError(f"{nmsw.folder} was not trained with an NMSW trainer: name one with -tr")
    _check_folds(nmsw, args.f)
    if args.tr_baseline == "none":
        return [nmsw]
    trainer = args.tr_baseline or DEFAULT_BASELINE
    folder = _folder(dataset, trainer, args.p_baseline or args.p, args.c_baseline or args.c)
    checkpoint = args.chk_baseline or args.chk
    if args.tr_baseline is None and not all((folder / f"fold_{fold}" / checkpoint).is_file() for fold in args.f):
        if args.p_baseline or args.c_baseline or args.chk_baseline:
            raise UserError(
                "-p_baseline, -c_baseline and -chk_baseline name checkpoints "
                f"{folder / 'fold_X' / checkpoint}, and not all of the folds {args.f} have one"
            )
        return [nmsw]
    baseline = Model("baseline", checked_folder(folder), trainer, checkpoint, args.trust_model)
    if PLANS_KEY in baseline.configuration and "downsampling_factor" in baseline.configuration[PLANS_KEY]:
        raise UserError(f"the baseline {baseline.folder} was trained with NMSW: name a stock trainer with -tr_baseline")
    _check_folds(baseline, args.f)
    if len(baseline.configuration["patch_size"]) != 3:
        raise UserError(f"the baseline {baseline.folder} must be a 3D configuration")
    for key in ("labels", "channel_names"):
        ours, theirs = nmsw.json("dataset.json").get(key), baseline.json("dataset.json").get(key)
        if ours != theirs:
            raise UserError(
                f"the two models differ in their {key.replace('_', ' ')}: {ours} in {nmsw.folder / 'dataset.json'}, "
                f"{theirs} in {baseline.folder / 'dataset.json'}; compare models of the same task"
            )
    return [baseline, nmsw]


def find_cases(dataset: str, folds: Sequence[int], models: Sequence[Model]) -> list[Case]:
    """The validation cases of the folds, each with the files of the raw dataset.

    Raises:
        UserError: see `validation_cases`; or a file is missing, or a case is in two folds.
    """
    splits = Path(str(nnUNet_preprocessed)) / dataset / SPLITS_FILE
    held_out = validation_cases(splits, folds, models)
    raw = Path(str(nnUNet_raw)) / dataset
    if not (raw / "dataset.json").is_file():
        raise UserError(f"the raw dataset is missing: no {raw / 'dataset.json'}; nmsw_compare reads the images there")
    dataset_json = read_document(raw, "dataset.json")
    if "dataset" not in dataset_json and not (raw / "imagesTr").is_dir():
        raise UserError(f"the training images are missing: no {raw / 'imagesTr'}; nmsw_compare reads them there")
    try:
        files = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{raw / 'dataset.json'} is broken at dataset: {reason(error)}") from error
    cases: list[Case] = []
    channels = len(dataset_json.get("channel_names") or dataset_json["modality"])
    for fold, names in held_out.items():
        for name in names:
            if name not in files:
                raise UserError(
                    f"images of validation case {name} of fold {fold} are missing in {raw / 'imagesTr'}, and {splits} "
                    "names it"
                )
            if name in {case.name for case in cases}:
                raise UserError(f"{splits} has case {name} in the validation set of more than one of the folds {folds}")
            images, reference = files[name]["images"], files[name]["label"]
            if len(images) != channels:
                raise UserError(
                    f"validation case {name} of fold {fold} has {len(images)} of {channels} "
                    f"channels: {', '.join(Path(image).name for image in images)}"
                )
            missing = [path for path in (*images, reference) if not Path(path).is_file()]
            if missing:
                raise UserError(f"validation case {name} of fold {fold} misses a file: {missing[0]}")
            cases.append(Case(name, fold, tuple(images), reference))
    return cases


def validation_cases(splits: Path, folds: Sequence[int], models: Sequence[Model]) -> dict[int, list[str]]:
    """Names of the cases that no model of a fold was trained on, by fold.

    Args:
        splits: nnU-Net's splits_final.json.
        folds: to look up.
        models: that were trained with them.

    Raises:
        UserError: there are no splits, or a model was validated on other cases than the splits say, so that it may have
            been trained on these.
    """
    if not splits.is_file():
        raise UserError(f"there are no cross-validation splits {splits}: train with nnUNetv2_train, which makes them")
    read, held_out = read_json(splits, SPLITS), {}
    for fold in folds:
        if fold >= len(read):
            raise UserError(f"-f {fold}: {splits} has folds 0 to {len(read) - 1}")
        held_out[fold] = read[fold]["val"]
        for model in models:
            _check_validated(model, fold, held_out[fold], splits)
    return held_out


def _folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    return Path(str(nnUNet_results)) / dataset / f"{trainer}__{plans}__{configuration}"


def _check_folds(model: Model, folds: Sequence[int]) -> None:
    previous = model.configuration.get("previous_stage")
    if previous is not None:
        raise UserError(
            f"{model.folder} is the second stage of a cascade, and nmsw_compare has no predictions of {previous}: "
            "compare first stages, or predict with both stages and take nnUNetv2_evaluate_folder"
        )
    for fold in folds:
        if not model.checkpoint_file(fold).is_file():
            raise UserError(
                f"fold {fold} of {model.trainer} is not trained: there is no {model.checkpoint_file(fold)}; "
                "train it, or choose trained folds with -f"
            )


def _check_validated(model: Model, fold: int, names: Sequence[str], splits: Path) -> None:
    """Compare the splits with the cases that training validated on, where it did."""
    summary = model.validation_summary(fold)
    if not summary.is_file():
        return
    ending = model.json("dataset.json")["file_ending"]
    validated = {
        Path(case["prediction_file"]).name.removesuffix(ending)
        for case in read_json(summary, SUMMARY, "validate again with --val")["metric_per_case"]
    }
    if validated != set(names):
        raise UserError(
            f"{splits} has changed since fold {fold} of {model.trainer} was trained: {summary} holds other cases; "
            "restore the splits, or train again"
        )
