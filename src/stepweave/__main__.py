"""The command line as a module: `python -m stepweave`."""

from stepweave.cli.main import main

if __name__ == "__main__":
    main()
