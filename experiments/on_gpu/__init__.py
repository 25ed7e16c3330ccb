"""Everything that is to be measured on a GPU, by one command: ``python -m experiments.on_gpu --output DIR``."""
