"""Images turned into an orientation before a model sees them, and its labels turned back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.errors import UserError


class OrientedIO(SimpleITKIO):
    """nnU-Net's reader and writer, with images in one orientation between them.

    nnU-Net's own `SimpleITKIOWithReorient` knows one orientation, writes at most 255 labels, and lets rounding into the
    header. Here the header of the labels is the image's.
    """

    orientation: str

    def read_images(self, image_fnames: list[str] | tuple[str, ...]) -> tuple[np.ndarray, dict[str, Any]]:
        """See the parent. The properties say what the image was like in the file.

        Raises:
            ValueError: an image has not three axes, or its channels have different directions.
        """
        array_CZYX, properties = super().read_images(image_fnames)  # checks that channels fit each other
        geometry = properties["sitk_stuff"]
        if len(geometry["spacing"]) != 3:
            raise ValueError(f"only images of three axes have an orientation such as {self.orientation}")
        own = geometry["direction"]
        for file in image_fnames[1:]:
            header = sitk.ImageFileReader()
            header.SetFileName(file)
            header.ReadImageInformation()
            if not np.allclose(header.GetDirection(), own, atol=1e-3):
                raise ValueError("its channels have different directions in space: bring them onto one grid")
        turned = [self._turned(channel_ZYX, geometry, self.orientation) for channel_ZYX in array_CZYX]
        first = turned[0]
        return np.stack([sitk.GetArrayFromImage(image) for image in turned]), {
            "sitk_stuff": {
                "spacing": first.GetSpacing(),
                "origin": first.GetOrigin(),
                "direction": first.GetDirection(),
                "original_orientation": orientation_of(geometry["direction"]),
                "of_file": geometry,
            },
            "spacing": [float(abs(spacing)) for spacing in first.GetSpacing()[::-1]],
        }

    def write_seg(self, seg: np.ndarray, output_fname: str, properties: dict[str, Any]) -> None:
        """See the parent."""
        geometry = properties["sitk_stuff"]
        back = self._turned(seg, geometry, geometry["original_orientation"])
        super().write_seg(sitk.GetArrayFromImage(back), output_fname, {"sitk_stuff": geometry["of_file"]})

    @staticmethod
    def _turned(array_ZYX: np.ndarray, geometry: dict[str, Any], orientation: str) -> sitk.Image:
        image = sitk.GetImageFromArray(array_ZYX)
        image.SetSpacing(geometry["spacing"])
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
        return sitk.DICOMOrient(image, orientation)


class OrientedPlans(PlansManager):
    """Plans whose images are read in an orientation.

    Args:
        plans: as they are in `plans.json`.
        orientation: that the model was trained in, such as "RAS".
    """

    def __init__(self, plans: dict[str, Any], orientation: str) -> None:
        super().__init__(plans)
        self.orientation = orientation

    @property
    def image_reader_writer_class(self) -> type[SimpleITKIO]:
        """See the parent."""
        return type(OrientedIO.__name__, (OrientedIO,), {"orientation": self.orientation})


def orientation_of(direction: Sequence[float]) -> str:
    """Where the axes of an image point to, as the three letters of `flags.parse_orientation`.

    Args:
        direction: SimpleITK's, nine numbers.
    """
    letters: str = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction)
    return letters


def orient(predictor: nnUNetPredictor, orientation: str) -> None:
    """Let a predictor that has its model see images in an orientation.

    Raises:
        UserError: the model's reader reads images without a position in space.
    """
    reader = predictor.plans_manager.plans["image_reader_writer"]
    if not reader.startswith(("SimpleITK", "Nibabel")):
        raise UserError(f"--orientation {orientation}: the model reads images with {reader}, which have no orientation")
    predictor.plans_manager = OrientedPlans(predictor.plans_manager.plans, orientation)
