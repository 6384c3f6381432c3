"""The version of wagontrain."""

__version__ = "0.1.0"
