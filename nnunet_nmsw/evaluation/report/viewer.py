"""Layers of a case for the report's slice viewer: all slices of a layer in one image, embedded as a data URI."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from PIL import Image
from scipy import ndimage

from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.models import Case
from nnunet_nmsw.evaluation.store import Comparison
from nnunet_nmsw.inference.reading import read_image, read_segmentation

MAX_SLICES = 80
MAX_SIDE = 256
"""Larger volumes are shown by fewer slices, and by fewer pixels a slice."""

CLASS_COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2", "#FFFFFF")
"""Okabe and Ito's, brighter ones first; more classes than colours take turns."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer over all slices: a grid of slices, `columns` in a row.

    Attributes:
        name: for people.
        uri: the image.
    """

    name: str
    uri: str


@dataclasses.dataclass(frozen=True)
class ShownCase:
    """A case of the viewer, as its JavaScript reads it.

    Attributes:
        name: of the case.
        text: what there is to see.
        width: pixels of a slice.
        height: pixels of a slice.
        columns: slices in a row of a layer's image.
        slices: z index in the image of each slice.
        aspect: height of a pixel over its width, in mm.
        start: slice to begin with.
        image: first channel.
        score_map: score map, coloured; None where there is none.
        outlines: outlines of the reference, then of predictions.
        windows: by window x, y, width and height in pixels, first and last z index it covers, and its rank.
    """

    name: str
    text: str
    width: int
    height: int
    columns: int
    slices: list[int]
    aspect: float
    start: int
    image: Layer
    score_map: Layer | None
    outlines: list[Layer]
    windows: list[list[float]]


def show_case(
    comparison: Comparison, case: Case, record: dict[str, Any], methods: list[Method], text: str
) -> ShownCase:
    """Make the layers of a case.

    Args:
        comparison: the comparison.
        case: the case.
        record: its record.
        methods: whose predictions to show.
        text: what to say about the case.
    """
    reader = comparison.nmsw.plans.image_reader_writer_class()
    data, properties, _ = read_image(reader, case.images)
    image = data[0]
    _, y_spacing, x_spacing = properties["spacing"]
    every = max(1, math.ceil(image.shape[0] / MAX_SLICES))
    pixel = max(1, math.ceil(max(image.shape[1:]) / MAX_SIDE))
    slices = list(range(0, image.shape[0], every))
    pick = (slice(None, None, every), slice(None, None, pixel), slice(None, None, pixel))
    low, high = np.percentile(image, [1, 99.5])
    grey = ((image[pick] - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
    columns = math.ceil(math.sqrt(len(slices)))

    reference = _labels(case.reference, reader)
    outlines = [Layer("reference", _uri(_mosaic(_outline(reference[pick], comparison), columns)))]
    for method in methods:
        labels = _labels(str(comparison.prediction_file(case, method)), reader)
        outlines.append(Layer(method.name, _uri(_mosaic(_outline(labels[pick], comparison), columns))))
    map_layer = None
    if "score_map_scale" in record:
        score_map = _score_map(comparison, case, record, image.shape)[pick]
        colours = (colormaps["cividis"](score_map)[..., :3] * 255).astype(np.uint8)
        map_layer = Layer("score map", _uri(_mosaic(colours, columns), quality=85))
    ranks = record.get("ranks", range(1, len(record["windows"]) + 1))  # which records of earlier versions have not
    foreground = (reference > 0).sum((1, 2))[::every]
    return ShownCase(
        case.name,
        text,
        grey.shape[2],
        grey.shape[1],
        columns,
        slices,
        float(y_spacing / x_spacing),
        int(foreground.argmax()),
        Layer("image", _uri(_mosaic(grey, columns), quality=85)),
        map_layer,
        outlines,
        [
            [x0 / pixel, y0 / pixel, (x1 - x0) / pixel, (y1 - y0) / pixel, z0, z1, rank]
            for ((z0, y0, x0), (z1, y1, x1)), rank in zip(record["windows"], ranks, strict=True)
        ],
    )


def _labels(file: str, reader: BaseReaderWriter) -> np.ndarray:
    labels: np.ndarray = read_segmentation(reader, file)[0]
    return labels


def _score_map(comparison: Comparison, case: Case, record: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Score map at every voxel of the image, from 0 (smallest) to 1."""
    with np.load(comparison.record_file(case).with_suffix(".npz")) as file:
        score_map = file["score_map"].astype(np.float32)
    index = [
        np.floor((np.arange(n) + 0.5) * scale + shift).astype(int).clip(0, size - 1)
        for n, scale, shift, size in zip(
            shape, record["score_map_scale"], record["score_map_shift"], score_map.shape, strict=True
        )
    ]
    low, high = score_map.min(), score_map.max()
    spread: np.ndarray = (score_map[np.ix_(*index)] - low) / max(float(high - low), 1e-6)
    return spread


def _outline(labels: np.ndarray, comparison: Comparison) -> np.ndarray:
    """RGBA of the inner edge of every class in each slice."""
    rgba = np.zeros((*labels.shape, 4), np.uint8)
    in_plane = ndimage.generate_binary_structure(2, 1)[None]
    for index, label in enumerate(comparison.labels):
        mask = np.isin(labels, label)
        edge = mask & ~ndimage.binary_erosion(mask, in_plane)
        colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
        rgba[edge] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)] + [255]
    return rgba


def _mosaic(slices: np.ndarray, columns: int) -> np.ndarray:
    rows = math.ceil(len(slices) / columns)
    missing = rows * columns - len(slices)
    padded = np.concatenate([slices, np.zeros((missing, *slices.shape[1:]), slices.dtype)])
    height, width = slices.shape[1:3]
    grid = padded.reshape(rows, columns, height, width, *slices.shape[3:]).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, *slices.shape[3:])


def _uri(pixels: np.ndarray, quality: int | None = None) -> str:
    """A data URI: JPEG of a quality, or lossless PNG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if quality is None:
        kind = "png"
        image.save(buffer, "png", optimize=True)
    else:
        kind = "jpeg"
        image.save(buffer, "jpeg", quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
