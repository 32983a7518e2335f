"""SHA-256, the identity of weights and artifacts."""

import hashlib
from pathlib import Path

from coat_deploy.errors import RepositoryError


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits, read as a stream.

    Raises: RepositoryError when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RepositoryError(f"{path}: cannot be read ({error.strerror or error}).") from error


def sha256_bytes(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
