"""Lets `python -m openm6 …` do what the `openm6` command does."""

from openm6.cli.main import main

if __name__ == "__main__":
    main()
