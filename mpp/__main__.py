"""Run the command line with `python -m mpp`."""

from mpp.cli.app import main

if __name__ == "__main__":
    main(prog_name="mpp")
