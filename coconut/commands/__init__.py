"""Entry points: plain functions, each also a subcommand of ``coconut``."""
