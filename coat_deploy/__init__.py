"""Load a CoaT checkpoint, export it, prove the export equal to PyTorch, measure and run it."""

from typing import TYPE_CHECKING, Any

from coat_deploy.version import __version__

if TYPE_CHECKING:
    from coat_deploy.network.coat import create_network

__all__ = ["__version__", "create_network"]


def __getattr__(name: str) -> Any:
    """Import the public names that need PyTorch when they are first used."""
    if name == "create_network":
        from coat_deploy.network.coat import create_network

        return create_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
