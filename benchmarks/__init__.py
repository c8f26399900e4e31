"""The benchmark suite of ``cem-fast bench``: cases, peers, machine ceilings, the table of results and the report."""
