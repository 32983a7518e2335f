"""Load a CoaT checkpoint, export it, prove the export equal to PyTorch, measure and run it."""

from typing import TYPE_CHECKING, Any

from coat_deploy.version import __version__

if TYPE_CHECKING:
    from coat_deploy.network.coat import create_network

__all__ = ["__version__", "create_network"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import the public names that need PyTorch when they are first used."""
    if name == "create_network":
        try:
            from coat_deploy.network.coat import create_network
        except ModuleNotFoundError as error:
            from coat_deploy.errors import BackendMissing

            raise BackendMissing(
                f"create_network: package {error.name} is not installed. "
                'Run: pip install "coat-deploy[torch]"'
            ) from error
        return create_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
