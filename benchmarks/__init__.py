"""The benchmark suite behind ``cem-fast bench``: cases, peers, ceilings of the machine, the table of results and its report."""
