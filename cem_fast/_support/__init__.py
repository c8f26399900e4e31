"""Small helpers that every layer may use; none of them knows another part of the package."""
