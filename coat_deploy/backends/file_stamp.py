"""What tells that a file is still the one that was loaded."""

from dataclasses import dataclass
from pathlib import Path

from coat_deploy.errors import RunnerError


@dataclass(frozen=True)
class FileStamp:
    """A file as it was found; `found` is None where there was none.

    A runner may read its file again long after it was loaded. If another had taken its place by
    then, images of one batch would be answered by two networks.
    """

    path: Path
    found: tuple[int, int, int] | None

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Return the stamp of a file as it is now."""
        try:
            stat = path.stat()
        except OSError:
            return cls(path, None)
        return cls(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))

    def check(self) -> None:
        """Raise RunnerError where the file is no longer the same."""
        if FileStamp.of(self.path) != self:
            raise RunnerError(f"{self.path}: another file than was loaded. Load it again.")
