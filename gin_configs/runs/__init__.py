"""Gin files; a package so that gin finds them wherever this is installed."""
