"""Helpers of the tests: problems, exact results, tolerances, small data and processes."""
