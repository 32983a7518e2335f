"""JSON documents of a model folder, which may come from a stranger: read and formatted."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coat_deploy.errors import CoatDeployError

MAX_JSON_BYTES = 16 << 20
"""Largest document that is read; a thousand long labels are 50 KB."""

_NUMBER = r"-?\d[\d.e+-]*"
# A line break behind "[" is never inside a string, where it would be escaped.
_NUMBERS = re.compile(rf"\[\n\s+({_NUMBER}(?:,\s+{_NUMBER})*)\s+\]")


def read_json(path: Path, error: type[CoatDeployError]) -> Any:
    """Return the document in a file. Raises `error` naming the file and the reason."""
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise error(f"{path}: not a file. Remove it.")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(
                f"{path}: too large (got {size} bytes, expected {MAX_JSON_BYTES} at most). "
                "Check that it is the right file."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}). Check the path.") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: is not JSON ({reason}). Restore or rewrite it.") from reason


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Return the content of a file: indented, but a list of numbers in one line."""
    text = json.dumps(document, indent=2, allow_nan=False)
    return (_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n").encode()
