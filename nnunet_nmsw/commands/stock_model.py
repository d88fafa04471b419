"""The stock model that `nmsw_retrofit` starts from, checked against the preprocessed dataset before any training."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_nmsw import trainers
from nnunet_nmsw.commands.find import find_folds
from nnunet_nmsw.documents import DATASET, PLANS, read_json
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.models import SPLITS_FILE, Model, dataset_name, find_cases, validation_cases
from nnunet_nmsw.inference.model_folder import checked_folder, configuration_in, read_configuration, read_document
from nnunet_nmsw.model.safe_loading import check_origin, configuration_of, read_checkpoint
from nnunet_nmsw.settings import PLANS_KEY
from nnunet_nmsw.trainers.pretrained import LOCAL_BRANCH

OF_PLANS = (
    "transpose_forward",
    "transpose_backward",
    "image_reader_writer",
    "label_manager",
    "foreground_intensity_properties_per_channel",
)
"""Keys of plans that decide on what a network sees, beside the configuration."""

MAY_DIFFER = {"batch_size", PLANS_KEY}
"""Keys of a configuration that a trained stock model does not depend on."""


class StockModel(NamedTuple):
    """A trained stock model.

    Attributes:
        model: its folder, trainer and checkpoints.
        dataset: nnU-Net's name of the dataset.
        plans: identifier of the plans.
        configuration: name of the configuration.
        folds: to retrofit.
    """

    model: Model
    dataset: str
    plans: str
    configuration: str
    folds: list[int | str]

    @property
    def numbers(self) -> list[int]:
        """The folds that have validation cases of their own: all but "all"."""
        return [fold for fold in self.folds if isinstance(fold, int)]

    def checkpoint(self, fold: int | str) -> Path:
        """The checkpoint that the retrofit of a fold begins from."""
        return self.model.folder.resolve() / f"fold_{fold}" / self.model.checkpoint

    def folder_of(self, trainer: str) -> Path:
        """Where nnU-Net puts models of a trainer with these plans."""
        return Path(str(nnUNet_results)) / self.dataset / f"{trainer}__{self.plans}__{self.configuration}"


def find_stock_model(folder: Path, dataset: str | None, folds: Sequence[str] | None, checkpoint: str) -> StockModel:
    """Read what a model folder says of itself.

    Args:
        folder: of the model.
        dataset: name or number; None for the one that the plans name.
        folds: None for all that are trained.
        checkpoint: file name of the checkpoints.

    Raises:
        UserError: a file is missing or broken, or it is no stock model that can be retrofitted.
    """
    chosen = find_folds(checked_folder(folder), folds, checkpoint)
    plans = read_document(folder, "plans.json")
    names = [dataset or plans.get("dataset_name"), plans.get("plans_name")]
    for key, name in zip(("dataset_name", "plans_name"), names, strict=True):
        if not isinstance(name, str):
            raise UserError(f"{folder / 'plans.json'} is broken: it has no {key}")
    trained_as: tuple[str, str] | None = None
    for fold in chosen:
        file = folder / f"fold_{fold}" / checkpoint
        trained = read_checkpoint(file, mmap=True, training=True)
        told = (configuration_of(trained, file), trained["trainer_name"])
        if any(name.startswith(LOCAL_BRANCH) for name in trained["network_weights"]):
            raise UserError(f"{file} is of an NMSW model: nmsw_retrofit starts from a stock model, name one with -m")
        if str(trained["init_args"].get("fold")) != str(fold):
            raise UserError(
                f"{file} was trained on fold {trained['init_args'].get('fold')}, so it has seen validation cases of "
                f"fold {fold}: put the checkpoint of fold {fold} there, or leave the fold out with -f"
            )
        if trained_as is not None and told != trained_as:
            raise UserError(
                f"{file} was trained by {told[1]} on {told[0]}, another fold by {trained_as[1]} on {trained_as[0]}: "
                "choose folds that belong together with -f"
            )
        trained_as = told
    assert trained_as is not None
    configuration, trainer = trained_as
    resolved = read_configuration(folder, configuration)
    if len(resolved["patch_size"]) != 3 or resolved.get("previous_stage"):
        raise UserError(f"{folder} is of {configuration}: only 3D configurations without a previous stage are taken")
    model = Model("baseline", folder, trainer, checkpoint)
    return StockModel(model, dataset_name(str(names[0])), str(names[1]), configuration, chosen)


def check_trainer(name: str) -> None:
    """See that a trainer retrofits.

    Raises:
        UserError: there is no such trainer, or it trains something else.
    """
    trainer = getattr(trainers, name, None)
    if trainer is None:  # nnU-Net's search imports all trainers that there are
        try:
            with contextlib.redirect_stdout(None):  # it tells how it searches
                trainer = recursive_find_trainer_class_by_name(name)
        except (RuntimeError, AssertionError):  # there is none, or the class is no trainer
            trainer = None
    if not (isinstance(trainer, type) and issubclass(trainer, trainers.nnUNetTrainerNMSW_retrofit)):
        raise UserError(
            f"-tr {name} does not retrofit: give nnUNetTrainerNMSW_retrofit, nnUNetTrainerNMSW_retrofit_context, or "
            "one of these for fewer epochs, such as nnUNetTrainerNMSW_retrofit_50epochs"
        )


def check_preprocessed(stock: StockModel) -> None:
    """See that the dataset is preprocessed as the stock model's was.

    Raises:
        UserError: it is not preprocessed, other plans have the identifier, or the splits are other ones.
    """
    folder = Path(str(nnUNet_preprocessed)) / stock.dataset
    file, dataset_file = folder / f"{stock.plans}.json", folder / "dataset.json"
    for needed in (file, dataset_file):
        if not needed.is_file():
            raise UserError(
                f"{stock.dataset} is not preprocessed with the model's plans: there is no {needed}; run "
                "nnUNetv2_plan_and_preprocess, or copy the folder from where the model was trained"
            )
    ours, theirs = read_json(file, PLANS), read_document(stock.model.folder, "plans.json")
    here = configuration_in(ours, stock.configuration, file)
    there = read_configuration(stock.model.folder, stock.configuration)
    pairs = {key: (theirs.get(key), ours.get(key)) for key in OF_PLANS}
    pairs |= {key: (there.get(key), here.get(key)) for key in sorted({*there, *here} - MAY_DIFFER)}
    labels = (stock.model.json("dataset.json")["labels"], read_json(dataset_file, DATASET)["labels"])
    different = next((key for key, (of_model, of_dataset) in pairs.items() if of_model != of_dataset), None)
    if different is not None:
        raise UserError(
            f"{file} differs in {different} from {stock.model.folder / 'plans.json'}: preprocess the dataset with the "
            "plans that the model was trained with"
        )
    if labels[0] != labels[1]:
        raise UserError(f"{dataset_file} has other labels than the model: {labels[1]}, and the model has {labels[0]}")
    for key, name in (("dataset_name", stock.dataset), ("plans_name", stock.plans)):
        if ours.get(key) != name:
            raise UserError(f"{file} is broken at {key}: it is {ours.get(key)!r}, and nnU-Net looks for {name!r}")
    data = folder / here["data_identifier"]
    if not data.is_dir() or not any(data.iterdir()):
        raise UserError(
            f"{stock.dataset} is not preprocessed for {stock.configuration}: there are no files in {data}; run "
            f"nnUNetv2_preprocess -d {stock.dataset} -plans_name {stock.plans} -c {stock.configuration}"
        )
    validation_cases(folder / SPLITS_FILE, stock.numbers, [stock.model])


def check_comparable(stock: StockModel, trust: bool) -> None:
    """See that `nmsw_compare` can compare with the stock model when all is trained.

    Raises:
        UserError: it cannot.
    """
    instead = "or leave the comparison out with --no_compare"
    if stock.numbers != stock.folds:
        raise UserError(f"-f all: its cases were trained on, so nothing can be compared; give other folds, {instead}")
    folder = stock.folder_of(stock.model.trainer)
    if folder.resolve() != stock.model.folder.resolve():
        raise UserError(f"nmsw_compare looks for the stock model in {folder}: move or link the folder there, {instead}")
    if not trust:
        where = f"{stock.model.folder / 'plans.json'}, configurations.{stock.configuration}"
        check_origin(stock.model.configuration["architecture"], where)
    find_cases(stock.dataset, stock.numbers, [stock.model])
