"""Benchmarks: ratios measured in one process, the last line of output one JSON object."""
