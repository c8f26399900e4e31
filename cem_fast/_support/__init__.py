"""Small helpers for every layer, without imports from the rest of the package."""
