"""Measurements beside named peers, run from the project's folder: python -m benchmarks.NAME.

This file makes the folder a package: another package of this name, which pyarrow 17 installs, would hide it.
"""
