"""Section, page and plots of the table; the committed section and page match the committed table."""

from dataclasses import replace
from pathlib import Path

import pytest
from cem_fast.benchmarks import report, table, training
from cem_fast.benchmarks.table import WRONG, Recorded, Row
from support.bench_rows import END, ROW, RUN

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EAGER = replace(ROW, contender="torch eager", version="2.14.1", p20_ms=2.4, p50_ms=2.5, p80_ms=2.6)
COMPILED = replace(EAGER, contender="torch.compile", p50_ms=1.7, first_ms=9_000.0)


def timed(group, op, contender, direction, p50, **more):
    return Row(group, op, contender, direction=direction, p20_ms=p50, p50_ms=p50, p80_ms=p50, rounds=3, **more)


def line_of(section, start):
    (found,) = [line for line in section.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


LABEL = "CEMLoss, Eq. 5-7: 128 x 512, C = 10, K = 5"


def test_the_table_shows_cem_fast_and_the_fastest_other():
    section = report.section([Recorded(RUN, [ROW, EAGER, COMPILED, END])], "results")
    assert line_of(section, LABEL) == [LABEL, "1.00 ms", "torch.compile 1.70 ms", "1.7x", "50%", "", "", "", ""]
    assert "No GPU results yet" in section
    assert (
        "`cem-fast bench` on 2026-01-02 (A processor, with a comma, threads: 2 on cores 0, 1; torch 2.14.1, commit aaaaaa"
        in section
    )
    assert "takes 9,000 ms to 9,000 ms per shape" in section


def test_a_gpu_run_fills_the_gpu_columns():
    gpu = replace(RUN, device="cuda", processor="A GPU", run="2026-02-02T00:00:00+00:00")
    fast = [replace(row, p50_ms=row.p50_ms / 100) for row in (ROW, EAGER)]
    triton = replace(fast[0], contender="cem_fast, Triton operators", p50_ms=0.001)
    runs = [Recorded(RUN, [ROW, EAGER, END]), Recorded(gpu, [*fast, triton, END])]
    cells = line_of(report.section(runs, "results"), LABEL)
    assert cells[5:] == ["0.0100 ms", "torch eager 0.0250 ms", "2.5x", "50%"]
    assert cells[1] == "1.00 ms"
    assert "No GPU results" not in report.section(runs, "results")


def test_cases_with_a_faster_contender_are_listed():
    faster = replace(COMPILED, p20_ms=0.4, p50_ms=0.5, p80_ms=0.6)
    level = replace(EAGER, p20_ms=0.9, p50_ms=0.95, p80_ms=1.1)
    assert "Another contender is faster" not in report.section([Recorded(RUN, [ROW, EAGER, level, END])], "results")
    section = report.section([Recorded(RUN, [ROW, EAGER, level, faster, END])], "results")
    assert f"Another contender is faster in 1 case: {LABEL}: 1.00 ms, torch.compile 0.500 ms." in section


def test_wrong_rows_are_red_and_have_no_speedup(tmp_path):
    wrong = replace(EAGER, status=WRONG, note="off by 1e-01, allowed 1e-03", p20_ms=None, p50_ms=None, p80_ms=None)
    rows = [ROW, wrong, COMPILED, END]
    cells = line_of(report.section([Recorded(RUN, rows)], "results"), LABEL)
    assert cells[2] == "torch.compile 1.70 ms"
    table.append(tmp_path, RUN, rows)
    report.write(tmp_path, None)
    assert "🟥 **wrong**: off by 1e-01" in (tmp_path / report.PAGE).read_text()
    ours = replace(ROW, status=WRONG, note="off by 1e-01", p50_ms=None)
    cells = line_of(report.section([Recorded(RUN, [ours, EAGER, END])], "results"), LABEL)
    assert cells[1:5] == ["**wrong**", "", "", ""]


def test_the_last_complete_run_is_shown():
    slow = replace(ROW, p50_ms=5.0)
    part = Recorded(replace(RUN, mode="part"), [slow, END])
    interrupted = Recorded(replace(RUN, run="later"), [slow])
    complete = Recorded(replace(RUN, run="2026-01-01"), [replace(ROW, p50_ms=3.0), END])
    section = report.section([Recorded(RUN, [slow, END]), complete, part, interrupted], "results")
    assert line_of(section, LABEL)[1] == "3.00 ms"


def test_without_a_complete_run_there_are_no_figures(tmp_path):
    assert report.section([Recorded(RUN, [ROW, EAGER])], "results").startswith("No complete run yet")
    table.append(tmp_path, RUN, [])
    assert report.write(tmp_path, None) == [tmp_path / report.PAGE]


def test_sentences_come_from_the_rows():
    shape = {"N": 1_280, "D": 512, "C": 10, "K": 5, "note": f"batches of {training.BATCH}, 32x32 pixels"}
    of = lambda name, direction, p50: timed("training", "epoch of VGG11", name, direction, p50, **shape)  # noqa: E731
    rows = [
        of(training.PLAIN, training.STEP, 100.0),
        of(training.OURS, training.STEP, 100.5),
        of(training.RELEASED, training.STEP, 150.0),
        of(training.OURS, training.ADDED, 0.5),
        of(training.RELEASED, training.ADDED, 50.0),
        of(training.OURS, training.REFIT, 15.0),
        of(training.RELEASED, training.REFIT, 500.0),
        of(training.OURS, training.REFIT_OWN_PASS, 100.0),
        timed("startup", "new process", "import torch", "once", 1_234.0),
        Row("fitting", "fit_stream", "cem_fast", N=20_000, D=128, note="memory budget 32 MiB", peak_mib=70.4),
        Row("fitting", "fit_stream", "cem_fast", N=80_000, D=128, note="memory budget 32 MiB", peak_mib=71.0),
        *(
            timed("fitting", "em", "cem_fast", "fit", p50, N=n, axis="N")
            for n, p50 in ((10, 1.0), (100, 2.0), (1_000, 20.0))
        ),
        timed("fitting", "refit", "cem_fast", "fit", 22.6, N=50_000, D=512, C=10, K=5),
        END,
    ]
    section = report.section([Recorded(RUN, rows)], "somewhere")
    assert "100 ms per step): CEM adds 0.500 ms per step (0.500 ms to 0.500 ms) and a refit of 15.0 ms" in section
    assert "of the epoch, +2.0% in total." in section  # 10 steps of 100 ms; 10 x 0.5 + 15
    assert "the released loop adds 50.0 ms per step" in section
    assert "of the epoch, +100.0% in total." in section
    assert "its own encoder pass takes 100 ms, 10.0% of that epoch" in section
    assert "New process: import torch 1,234 ms." in section
    assert (
        "Streamed fits of 20,000, 80,000 rows of 128 features add 70, 71 MiB of memory (memory budget 32 MiB)"
        in section
    )
    assert "over the last decade of each size ([curves](somewhere/fitting.png)): em: N 1.00." in section
    assert "A refit of 50,000 rows of 512 features (10 classes, 5 components) takes 22.6 ms." in section
    assert "[All rows](somewhere/bench.md), with errors, memory and quantiles: 16 ok." in section


def test_page_and_plots_are_written_from_the_table(tmp_path):
    curves = [
        replace(ROW, group=group, op=op, axis="N", N=n, direction=direction, contender=name)
        for group, op, direction in (("scaling", "cem_paper", "both"), ("fitting", "kmeans", "fit"))
        for name in ("cem_fast", "scikit-learn")
        for n in (10, 100)
    ]
    table.append(tmp_path, RUN, [ROW, EAGER, *curves, END])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold figures\n{report.END}\nafter\n")
    written = report.write(tmp_path, readme)
    assert {path.name for path in written} == {report.PAGE, *report.PLOTS, "README.md"}
    assert all(path.stat().st_size > 1_000 for path in written if path.suffix == ".png")
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nMeasured by")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old figures" not in text
    page = (tmp_path / report.PAGE).read_text()
    assert (
        "| torch eager | 2.14.1 | both | 2.50 ms | 2.40 ms to 2.60 ms | 1.50 ms | 1e-07 | 0.2 | 50% of memory |" in page
    )


def test_a_file_without_markers_stays_unchanged(tmp_path):
    table.append(tmp_path, RUN, [ROW, END])
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match="must have one section between"):
        report.write(tmp_path, readme)
    assert readme.read_text() == "no markers\n"


@pytest.mark.parametrize(
    "value, text",
    [(0.0123, "0.0123 ms"), (1.0, "1.00 ms"), (-2.5, "-2.50 ms"), (1234.5, "1,234 ms"), (0, "0 ms"), (None, "")],
)
def test_milliseconds_have_three_significant_digits(value, text):
    assert report.ms(value) == text


def test_the_committed_section_matches_the_table():
    """Regenerate with ``cem-fast bench --render --save benchmarks/results --readme docs/results/benchmarks.md``."""
    page = ROOT / "docs" / "results" / "benchmarks.md"
    text, runs = page.read_text(), table.read(RESULTS / table.FILE)
    assert report.replaced(text, report.section(runs, "../../benchmarks/results"), page) == text


def test_the_committed_page_matches_the_table():
    runs = table.read(RESULTS / table.FILE)
    assert "\n".join(report._page(runs)) + "\n" == (RESULTS / report.PAGE).read_text()
