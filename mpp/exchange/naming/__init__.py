"""Names that other projects give an encoder's weights, a file a project: `RULES`, see `mpp.exchange.naming_rules`."""
