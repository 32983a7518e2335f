"""`python -m coat_deploy`: the command line."""

from coat_deploy.cli.app import main

if __name__ == "__main__":
    main()
