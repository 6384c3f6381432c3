"""The ways of distributing, one file each. What is listed here is the feature list."""
