"""The version of wagontrain."""

VERSION = "0.1.0"
