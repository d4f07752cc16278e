"""Names of an encoder's weights in other projects, one file for each project; see `mpp.exchange.naming_rules`.

Each file defines `RULES` for the names, and `TRAINED`, which describes the project's published weights.
"""
