"""What a file tells of itself. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# The key of what a file tells of itself, a JSON object, among its metadata.
METADATA = "tqc"
READS = 2  # the newest packed format that this package reads (docs/format.md)


class ModelFileError(ValueError):
    """A file that is none of ours, or newer than this package; the message is one line."""


def read_metadata(properties: Mapping[str, str], path: Any) -> dict[str, Any]:
    """What `export_onnx` wrote about the file.

    Raises:
        ModelFileError: if it did not write the file, or a newer one did.
    """
    if METADATA not in properties:
        raise ModelFileError(f"{path} was not written by tqc.export_onnx: its metadata has no {METADATA!r}")
    try:
        found = json.loads(properties[METADATA])
        version = int(found["format_version"])
    except (ValueError, TypeError, KeyError):
        raise ModelFileError(
            f"{path} has malformed metadata: {METADATA!r} is not what tqc.export_onnx writes"
        ) from None
    if version > READS:
        raise ModelFileError(
            f"{path} is of packed format version {version}, and this package reads up to {READS}: a newer one reads it"
        )
    return found
