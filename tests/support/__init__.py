"""What tests share: problems, exact answers, tolerances, small data, and processes to run."""
