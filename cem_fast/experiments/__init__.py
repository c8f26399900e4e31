"""Settings -> runs -> results on disk."""
