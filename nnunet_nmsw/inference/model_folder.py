"""Folders of trained models: found, checked, and loaded into predictors without running code that came with them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.documents import CALIBRATION, DATASET, PLANS, check, read_json
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.model.architecture import global_architecture
from nnunet_nmsw.model.by_trainer import PartsOf, parts_by_trainer
from nnunet_nmsw.model.context import channels_of_context
from nnunet_nmsw.model.network import build_network
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.model.safe_loading import check_finite, check_origin, configuration_of, loading, read_checkpoint
from nnunet_nmsw.selection.budget import UNCALIBRATED
from nnunet_nmsw.selection.calibration import CALIBRATION_KEY, FILE, threshold_of, threshold_of_folds
from nnunet_nmsw.settings import PLANS_KEY

DOCUMENTS: dict[str, dict[str, Any]] = {"plans.json": PLANS, "dataset.json": DATASET}
"""What training leaves in the folder of a model, with the schema of each."""

NEEDED = ("patch_size", "spacing", "normalization_schemes", "architecture")
"""Keys of a configuration, inheritance resolved, without which nothing can be predicted."""


def checked_folder(folder: Path) -> Path:
    """The folder of a trained model.

    Raises:
        UserError: it is none.
    """
    for name in DOCUMENTS:
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not the folder of a trained model: it has no {name}")
    return folder


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """One of `DOCUMENTS` of a model folder.

    Raises:
        UserError: it cannot be read or is broken.
    """
    content: dict[str, Any] = read_json(folder / name, DOCUMENTS[name])
    return content


def read_configuration(folder: Path, name: str) -> dict[str, Any]:
    """A configuration of a model's plans, inheritance resolved.

    Raises:
        UserError: the plans cannot be read or are broken, or have no such configuration.
    """
    return configuration_in(read_document(folder, "plans.json"), name, folder / "plans.json")


def configuration_in(plans: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    """A configuration of plans, inheritance resolved.

    Args:
        plans: as `documents.PLANS` wants them.
        name: of the configuration.
        file: of the plans, for the message.

    Raises:
        UserError: the plans are broken, or have no such configuration.
    """
    if name not in plans["configurations"]:
        raise UserError(f"{file} has no configuration {name}; it has {', '.join(plans['configurations'])}")
    try:
        configuration: dict[str, Any] = PlansManager(plans).get_configuration(name).configuration
    except Exception as error:  # nnU-Net takes plans as they are
        raise UserError(f"{file} is broken at configurations.{name}: {reason(error)}") from error
    missing = next((key for key in NEEDED if key not in configuration), None)
    if missing is not None:
        raise UserError(f"{file} is broken at configurations.{name}: it has no {missing}")
    return configuration


def trained_folds(folder: Path, checkpoint: str) -> list[int]:
    """Numbers of the folds that have a checkpoint."""
    matches = (
        re.fullmatch(r"fold_(0|[1-9]\d*)", path.name) for path in folder.glob("fold_*") if (path / checkpoint).is_file()
    )
    return sorted(int(match[1]) for match in matches if match)


def folds_to_load(folder: Path, folds: Sequence[int | str] | str | None, checkpoint: str) -> Sequence[int | str]:
    """Folds as nnU-Net's predictors take them: some, one by its name, or None for all that are trained.

    Raises:
        UserError: no fold is trained.
    """
    found = [folds] if isinstance(folds, str) else folds or trained_folds(folder, checkpoint)
    if not found:
        raise UserError(f"no fold in {folder} has a {checkpoint}: finish a training, or name another one")
    return found


def threshold_for(
    num_patches: int | str | None,
    own: int | str | None,
    calibrations: dict[Path, dict[str, Any] | None],
    max_drop: float,
) -> float | None:
    """The threshold of the number of patches "auto", from checkpoints, or from what validations left beside them.

    Args:
        num_patches: that was asked for; None for the model's.
        own: the model's setting.
        calibrations: by checkpoint of the folds, see `initialize`.
        max_drop: see `threshold_of`.

    Returns:
        None where it is not needed. None, and a line for the user, where "auto" is the model's setting and nothing is
        calibrated: `UNCALIBRATED` patches are taken then.

    Raises:
        UserError: "auto" was asked for, and a fold has no calibration; or a calibration is broken.
    """
    if (own if num_patches is None else num_patches) != "auto":
        return None
    stored = {file: calibration for file, calibration in calibrations.items() if calibration is not None}
    for file, calibration in stored.items():
        check(calibration, CALIBRATION, f"{file}, {CALIBRATION_KEY}")
    if len(stored) == len(calibrations):
        return threshold_of(list(stored.values()), max_drop)
    folders = [file.parent for file in calibrations]
    if num_patches is None and not all((folder / "validation" / FILE).is_file() for folder in folders):
        print(
            f"{UNCALIBRATED} of the windows are taken: the model has no calibration, which its validation makes "
            "(nnUNetv2_train with --val)"
        )
        return None
    folds = [folder.name.removeprefix("fold_") for folder in folders]
    return threshold_of_folds(folders[0].parent, folds, max_drop)


def check_model(folder: Path, folds: Sequence[int | str], checkpoint: str, trust: bool) -> dict[Path, dict[str, Any]]:
    """See that a model can be loaded, before anything of it is.

    Args:
        folder: of the model.
        folds: to load.
        checkpoint: file name of the checkpoints.
        trust: let checkpoints and plans run code, as nnU-Net does.

    Returns:
        The checkpoints by their files, in the order of the folds. Tensors are on the disk.

    Raises:
        UserError: a file is missing, broken or damaged, or names code that no model needs.
    """
    checked_folder(folder)
    read_document(folder, "dataset.json")
    channels: dict[str, dict[Path, int | None]] = {}
    read: dict[Path, dict[str, Any]] = {}
    for fold in folds:
        file = folder / f"fold_{fold}" / checkpoint
        if not file.is_file():
            raise UserError(f"there is no checkpoint {file}: train that fold, or choose with -f and -chk")
        trained = read_checkpoint(file, trust, mmap=True)
        of_configuration = channels.setdefault(configuration_of(trained, file), {})
        of_configuration[file] = channels_of_context(trained["network_weights"])
        read[file] = trained
    for name in sorted(channels):  # one, unless folds of several trainings were put together
        configuration = read_configuration(folder, name)
        where = f"{folder / 'plans.json'}, configurations.{name}"
        if not trust:
            _check_origins(configuration, where)
        _check_context(configuration, channels[name], where)
    return read


def _check_context(configuration: dict[str, Any], trained: dict[Path, int | None], where: str) -> None:
    """See that the local branch is told of the volume as in training.

    Args:
        configuration: of the plans.
        trained: channels of the context by checkpoint; None of a stock model's, whose plans may be shared.
        where: the configuration stands, for the message.

    Raises:
        UserError: it is not.
    """
    given = configuration.get(PLANS_KEY, {})
    if not isinstance(given, dict):
        return  # the settings' own check says more
    wanted = given.get("context_channels", 0)
    for file, number in trained.items():
        if number not in (None, wanted):
            raise UserError(
                f'{where}: "context_channels" under "{PLANS_KEY}" is {wanted!r}, and {file} was trained with {number}: '
                "set it back"
            )


def _check_origins(configuration: dict[str, Any], where: str) -> None:
    """See that both branches of a configuration are made of networks and layers that are safe, see `check_origin`."""
    check_origin(configuration["architecture"], where)
    if PLANS_KEY not in configuration:
        return
    # As it will be built: what the settings leave out comes from the plans, and so may what to import.
    try:
        setting = settings_of(configuration).global_architecture
        merged = global_architecture(configuration["architecture"], setting, width=1.0)
    except (UserError, TypeError) as error:
        raise UserError(f"{where}: {reason(error)}") from error
    check_origin(merged, f"{where}.{PLANS_KEY}.global_architecture")


def initialize(
    load: Callable[..., None],
    predictor: nnUNetPredictor,
    folder: Path,
    folds: Sequence[int | str],
    checkpoint: str,
    trust: bool,
) -> dict[Path, dict[str, Any] | None]:
    """Load a model into a predictor, after `check_model`.

    Args:
        load: nnU-Net's `initialize_from_trained_model_folder`, for models of other trainers than this package's.
        predictor: whose method that is.
        folder: of the model.
        folds: to load.
        checkpoint: file name of the checkpoints.
        trust: see `check_model`.

    Returns:
        For each checkpoint the calibration of the number of patches that it holds, None where it holds none.

    Raises:
        UserError: see `check_model`; or the network cannot be built, or weights do not fit it or are no numbers.
    """
    folds = list({str(fold): fold for fold in folds}.values())
    read = check_model(folder, folds, checkpoint, trust)
    try:
        first = next(iter(read.values()))
        parts_of = parts_by_trainer(first["trainer_name"])
        if parts_of is None:
            with loading(trust):
                load(str(folder), tuple(folds), checkpoint)
        else:
            _initialize(predictor, folder, list(read.values()), parts_of)
    except UserError:
        raise
    except Exception as error:
        if trust:  # it is the user's own code, perhaps
            traceback.print_exception(error)
        # Plans and checkpoint are anybody's, and so is what nnU-Net and networks raise for them.
        raise UserError(
            f"cannot load {checkpoint} of folds {list(folds)} in {folder}, or plans.json and dataset.json there are of "
            f"another model: {reason(error)}"
        ) from error
    for file, weights in zip(read, predictor.list_of_parameters, strict=True):
        check_finite(weights, file)
    return {file: trained.get(CALIBRATION_KEY) for file, trained in read.items()}


def _initialize(
    predictor: nnUNetPredictor, folder: Path, checkpoints: Sequence[dict[str, Any]], parts_of: PartsOf
) -> None:
    """Load a model of one of this package's trainers, whose class is not needed for that."""
    dataset, plans = read_document(folder, "dataset.json"), PlansManager(read_document(folder, "plans.json"))
    configuration = plans.get_configuration(checkpoints[0]["init_args"]["configuration"])
    channels = (
        determine_num_input_channels(plans, configuration, dataset),
        plans.get_label_manager(dataset).num_segmentation_heads,
    )
    network = build_network(configuration, channels, deep_supervision=False, parts_of=parts_of)
    # Copies, as the file may be written anew while the model is in use.
    weights = [{name: w.clone() for name, w in read["network_weights"].items()} for read in checkpoints]
    network.load_state_dict(weights[0])
    trainer, axes = checkpoints[0]["trainer_name"], checkpoints[0].get("inference_allowed_mirroring_axes")
    predictor.manual_initialization(network, plans, configuration, weights, dataset, trainer, axes)
