"""The command line ``cem-fast``."""
