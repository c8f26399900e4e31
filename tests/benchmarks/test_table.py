"""The table of results: appending, reading, and comparing with an earlier table."""

from dataclasses import replace

import pytest
from cem_fast.benchmarks import table
from cem_fast.benchmarks.table import FAILED, OK, WRONG, Row
from support.bench_rows import END, ROW, RUN


def test_rows_are_appended_and_read_back(tmp_path):
    bad = replace(
        ROW, contender="x", status=WRONG, note='off by "a lot", really', p20_ms=None, p50_ms=None, p80_ms=None
    )
    table.append(tmp_path / "new", RUN, [ROW])
    before = (tmp_path / "new" / table.FILE).read_bytes()
    later = replace(RUN, run="2026-01-02T03:05:00+00:00", mode="part")
    table.append(tmp_path / "new", RUN, [bad, END])
    table.append(tmp_path / "new", later, [ROW, END])
    assert (tmp_path / "new" / table.FILE).read_bytes().startswith(before)
    first, second = table.read(tmp_path / "new" / table.FILE)
    assert (first.run, first.rows) == (RUN, [ROW, bad, END])
    assert (second.run, second.rows) == (later, [ROW, END])
    assert first.complete
    assert not second.complete  # only some groups
    assert not table.Recorded(RUN, [ROW]).complete  # interrupted


def test_a_table_with_other_columns_stays_unchanged(tmp_path):
    path = tmp_path / table.FILE
    path.write_text("run,op,speed\n1,2,3\n")
    with pytest.raises(ValueError, match="must have the columns of this version's table, got differences in .*speed"):
        table.append(tmp_path, RUN, [ROW])
    with pytest.raises(ValueError, match="got differences in .*speed"):
        table.read(path)
    assert path.read_text() == "run,op,speed\n1,2,3\n"


def test_an_invalid_number_is_reported_with_its_line(tmp_path):
    table.append(tmp_path, RUN, [ROW, ROW])
    path = tmp_path / table.FILE
    path.write_text(path.read_text()[::-1].replace("15", "fast", 1)[::-1])
    with pytest.raises(ValueError, match=r"bench\.csv, line 3: "):
        table.read(path)


@pytest.mark.parametrize(
    "p20, p50, p80, changed",
    [
        (0.9, 1.0, 1.1, False),  # the same
        (1.05, 1.3, 1.6, False),  # the ranges overlap: noise
        (1.2, 1.3, 1.4, True),
        (1.101, 1.045, 1.2, False),  # disjoint, but closer than the band
        (0.5, 0.6, 0.7, True),
    ],
)
def test_changes_exceed_the_noise(p20, p50, p80, changed):
    new = replace(ROW, p20_ms=p20, p50_ms=p50, p80_ms=p80)
    found, compared = table.changes([new], [ROW])
    assert compared == 1
    assert [(change.row, change.before) for change in found] == ([(new, ROW)] if changed else [])


def test_equal_cases_are_compared_and_the_largest_slowdown_comes_first():
    slow = [replace(ROW, direction=d, p20_ms=t, p50_ms=t, p80_ms=t) for d, t in (("both", 2.0), ("forward", 3.0))]
    old = [ROW, replace(ROW, direction="forward"), replace(ROW, N=64), replace(ROW, contender="torch eager")]
    new = [*slow, replace(slow[0], N=256), replace(slow[0], contender="torch eager", status=FAILED, p50_ms=None)]
    found, compared = table.changes(new, old)
    assert compared == 2
    assert [change.row.direction for change in found] == ["forward", "both"]
    assert found[0].factor == 3.0


def test_status_ok_is_the_default():
    assert Row("operations", "cem_paper", "x").status == OK
