"""What an encoder is written as besides timm's folder, a file a format, see `mpp.exchange.convert`.

`write(artifact, folder)` -> a word for what was written; `VERIFY`: the program of a clean process that loads it; `USE`:
the lines of the model card; `EXTRA`, `NEEDS`: the optional packages, by the name under which the project installs them.
"""
