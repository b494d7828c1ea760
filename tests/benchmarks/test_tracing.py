"""The tracing benchmark runs, and prints what its page says."""

import re

import pytest
import tracing


@pytest.mark.slow
def test_table(third_party):
    steps = tracing.contenders(tracing.Decoder(1, scanned=True))
    table = tracing.compare(steps, 1)
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ", table, re.M)
    assert [name for name, *_ in rows] == ["full", "split", "adapters_only"]
    times = [[int(x.replace(",", "")) for x in cells] for _, *cells in rows]
    assert min(map(min, times)) > 0
    assert all(abs(trace + lower - both) <= 2 for trace, lower, both in times)
    assert "1.00 (1.00 to 1.00)" in table


def test_a_function_without_adapters_compiles_to_itself(third_party):
    assert tracing.same_program()
