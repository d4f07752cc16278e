"""`python -m mpp`"""

from mpp.cli import main

if __name__ == "__main__":
    main(prog_name="mpp")
