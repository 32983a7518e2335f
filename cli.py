"""The command line from a checkout, without installing: `python cli.py --help`."""

from coat_deploy.__main__ import run

if __name__ == "__main__":
    run()
