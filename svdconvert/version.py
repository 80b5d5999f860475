"""The version of the package, which is also that of a source tree that is not installed."""

__version__ = "0.1.0"
