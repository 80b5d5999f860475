"""Runs generated Python programs where they can read the standard library and do nothing else."""
