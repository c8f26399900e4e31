"""A run and rows for tables of benchmark results."""

from cem_fast.benchmarks.table import LAST, Row, Run

RUN = Run(
    run="2026-01-02T03:04:05+00:00",
    mode="full",
    command="cem-fast bench",
    commit="a" * 40,
    cem_fast="0.1.0",
    torch="2.14.1",
    triton="",
    numpy="2.4.6",
    python="3.11.7",
    backend="compiled (avx512)",
    device="cpu",
    processor="A processor, with a comma",
    threads="2 on cores 0, 1",
    malloc="as the system has it",
)
ROW = Row(
    "operations",
    "cem_paper",
    "cem_fast",
    "0.1.0",
    *(128, 512, 10, 5),
    "spherical",
    "float32",
    direction="both",
    error=1.25e-7,
    allowed=1e-3,
    first_ms=1.5,
    p20_ms=0.9,
    p50_ms=1.0,
    p80_ms=1.1,
    rounds=51,
    peak_mib=0.25,
    share=0.5,
    bound="memory",
)
END = Row("ceilings", "copy", "machine", direction=LAST, note="30 GB/s", p20_ms=1.0, p50_ms=1.0, p80_ms=1.0)
