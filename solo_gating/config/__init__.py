"""Pre-training configs: grammar of the command line, schema, defaults, checks."""
