"""`python -m coat_deploy`: the command line."""

import sys

WRITTEN_WITH = ("typer", "rich")
"""What the command line is written with; a checkout may lie where nobody installed it."""


def run() -> None:
    """Run the command line; exit with a sentence where what it is written with is missing."""
    try:
        from coat_deploy.cli.app import main
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in WRITTEN_WITH:
            raise
        sys.exit(
            f"coat-deploy: package {package} is not installed, and the command line needs it. "
            f"Run: pip install {' '.join(WRITTEN_WITH)}. The GPU report runs without it: "
            "python -m coat_deploy.gpu_report."
        )
    main()


if __name__ == "__main__":
    run()
