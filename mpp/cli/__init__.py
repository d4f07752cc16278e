"""The command line. Importing the modules of commands adds the commands to `main`."""

from mpp.cli import data, encoders, recipes, runs, train
from mpp.cli.app import main

__all__ = ["data", "encoders", "main", "recipes", "runs", "train"]
