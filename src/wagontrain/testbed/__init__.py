"""A cluster on one machine: hosts that are network namespaces, with links as slow as asked for."""
