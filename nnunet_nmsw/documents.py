"""JSON files that others wrote: read in one place, checked against a schema, and reported by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

from nnunet_nmsw.errors import UserError, reason

NUMBER = {"type": "number"}
TEXT = {"type": "string"}
AXES = {"type": "array", "minItems": 2, "maxItems": 3}
SIZE = {**AXES, "items": {"type": "integer", "minimum": 1, "maximum": 1 << 20}}
SPACING = {**AXES, "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e6}}
COUNT = {"type": "integer", "minimum": 0, "maximum": 10_000_000}

LABEL = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]}
DATASET = {
    "type": "object",
    "required": ["labels", "file_ending"],
    "anyOf": [{"required": ["channel_names"]}, {"required": ["modality"]}],
    "properties": {
        "labels": {"type": "object", "required": ["background"], "additionalProperties": LABEL},
        "file_ending": {"type": "string", "pattern": r"^\.[A-Za-z0-9.]+$"},
        "channel_names": {"type": "object", "minProperties": 1, "additionalProperties": TEXT},
        "modality": {"type": "object", "minProperties": 1, "additionalProperties": TEXT},
        "regions_class_order": {"type": "array", "items": {"type": "integer"}},
    },
}
"""nnU-Net's dataset.json, as far as it is used."""

ORDER = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2}, "minItems": 3, "maxItems": 3}
PLANS = {
    "type": "object",
    "required": ["configurations", "transpose_forward", "transpose_backward", "image_reader_writer"],
    "properties": {
        "transpose_forward": ORDER,
        "transpose_backward": ORDER,
        "image_reader_writer": TEXT,
        "label_manager": TEXT,
        "foreground_intensity_properties_per_channel": {"type": "object"},
        "configurations": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "inherits_from": TEXT,
                    "patch_size": SIZE,
                    "spacing": SPACING,
                    "batch_size": {"type": "integer", "minimum": 1},
                    "median_image_size_in_voxels": {**AXES, "items": {"type": "number", "exclusiveMinimum": 0}},
                    "normalization_schemes": {"type": "array", "items": TEXT},
                    "use_mask_for_norm": {"type": "array", "items": {"type": "boolean"}},
                    "preprocessor_name": TEXT,
                    "data_identifier": TEXT,
                    "previous_stage": {"type": ["string", "null"]},
                    "nmsw": {"type": "object"},
                    "resampling_fn_data": TEXT,
                    "resampling_fn_seg": TEXT,
                    "resampling_fn_probabilities": TEXT,
                    "resampling_fn_data_kwargs": {"type": "object"},
                    "resampling_fn_seg_kwargs": {"type": "object"},
                    "resampling_fn_probabilities_kwargs": {"type": "object"},
                    "architecture": {
                        "type": "object",
                        "required": ["network_class_name", "arch_kwargs", "_kw_requires_import"],
                        "properties": {
                            "network_class_name": TEXT,
                            "arch_kwargs": {"type": "object"},
                            "_kw_requires_import": {"type": "array", "items": TEXT},
                        },
                    },
                },
            },
        },
    },
}
"""nnU-Net's plans.json, as far as it is used."""

SPLITS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["train", "val"],
        "properties": {name: {"type": "array", "items": TEXT} for name in ("train", "val")},
    },
}
"""nnU-Net's splits_final.json."""

SUMMARY = {
    "type": "object",
    "required": ["metric_per_case"],
    "properties": {
        "metric_per_case": {
            "type": "array",
            "items": {"type": "object", "required": ["prediction_file"], "properties": {"prediction_file": TEXT}},
        }
    },
}
"""nnU-Net's summary.json of a validation, as far as it is used."""

SOURCE = {
    "type": "object",
    "required": ["checkpoint", "sha256"],
    "properties": {"checkpoint": TEXT, "sha256": TEXT},
}
"""What a retrofit writes about the checkpoint that its local branch is from."""

CALIBRATION = {
    "type": "object",
    "required": ["cases", "thresholds"],
    "properties": {
        "cases": {"type": "integer", "minimum": 1, "maximum": 10_000_000},
        "thresholds": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["stop_at", "mean_dice"],
                "properties": {
                    "stop_at": {"type": "number", "minimum": 0, "maximum": 1e6},
                    "mean_dice": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                    "patches": {"type": "array", "items": COUNT},
                },
            },
        },
    },
}
"""What `selection.calibration` writes."""

COMPARISON = {
    "type": "object",
    "required": ["dataset", "models", "methods"],
    "properties": {"methods": {"type": "array", "items": TEXT}, "checkpoints": {"type": "object"}},
}
"""Settings of a comparison."""

METRICS = {"type": "object", "required": ["objects", "missed_objects", "false_positive_objects"]}
RECORD = {
    "type": "object",
    "required": ["case", "fold", "methods"],
    "properties": {
        "case": TEXT,
        "fold": COUNT,
        "threshold": {"type": ["number", "null"]},
        "methods": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["patches", "macs", "metrics", "covered_foreground"],
                "properties": {
                    "patches": COUNT,
                    "macs": NUMBER,
                    "covered_foreground": NUMBER,
                    "metrics": {"type": "object", "additionalProperties": METRICS},
                },
            },
        },
    },
}
"""Metrics of a case in a comparison."""

TIMING = {
    "type": "object",
    "required": ["method", "cases"],
    "properties": {
        "method": TEXT,
        "machine": TEXT,
        "cases": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["case", "network_seconds", "total_seconds", "host_peak_bytes", "device_peak_bytes"],
                "properties": {"case": TEXT, "network_seconds": NUMBER, "total_seconds": NUMBER},
            },
        },
    },
}
"""Seconds and memory of a method in a comparison."""


def read_json(file: Path, schema: dict[str, Any], remedy: str = "", finite: bool = False) -> Any:
    """Read a JSON file and check it.

    Args:
        file: to read.
        schema: JSON schema of its content.
        remedy: what to do where it is broken, behind the message.
        finite: refuse NaN and infinities, which Python writes though JSON has none.

    Raises:
        UserError: it cannot be read, is no JSON, or does not fit; names the file and the key.
    """
    hint = f"; {remedy}" if remedy else ""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_refuse if finite else None)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or reason(error)}{hint}") from error
    except (ValueError, RecursionError) as error:  # what is not UTF-8 or no JSON
        raise UserError(f"{file} is no JSON: {reason(error)}{hint}") from error
    check(content, schema, str(file), hint)
    return content


def check(content: Any, schema: dict[str, Any], where: str, hint: str = "") -> None:
    """See that a document fits its schema.

    Raises:
        UserError: it does not; names the key.
    """
    best = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(content))
    if best is None:
        return
    key = ".".join(map(str, best.absolute_path))
    raise UserError(f"{where} is broken{f' at {key}' if key else ''}: {_shortened(best.message)}{hint}")


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _shortened(message: str) -> str:
    """The message without a long value in its midst."""
    return message if len(message) <= 160 else f"{message[:60]} … {message[-90:]}"
