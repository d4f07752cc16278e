"""Export formats other than timm's folder, one file for each format; see `mpp.exchange.convert`.

Each file defines:

* `write(artifact, folder)`: writes the format and returns a word for what was written
* `use(artifact, folder)`: returns the usage example of the model card
* `VERIFY`: program that loads the export in a clean process
* `EXTRA`, `NEEDS`: extra of the project that installs optional packages, and the names of these packages
"""
