"""The tracing benchmark runs and prints the table of benchmarks/README.md."""

import re

import pytest
import tracing


@pytest.mark.slow
def test_compare_returns_a_table(third_party):
    steps = tracing.contenders(tracing.Decoder(1, scanned=True))
    table = tracing.compare(steps, 1)
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ", table, re.M)
    assert [name for name, *_ in rows] == ["full", "split", "adapters_only"]
    times = [[int(x.replace(",", "")) for x in cells] for _, *cells in rows]
    assert min(map(min, times)) > 0
    assert all(abs(trace + lower - both) <= 2 for trace, lower, both in times)
    assert "1.00 (1.00 to 1.00)" in table


def test_same_program_for_a_function_without_adapters(third_party):
    assert tracing.same_program()
