"""The command line from a checkout, without installing: `python cli.py --help`."""

from coat_deploy.cli.app import main

if __name__ == "__main__":
    main()
