"""Numbers as a line of blocks: order and extremes are kept, and a long run is averaged."""

from svdconvert.output.sparkline import sparkline


def test_the_lowest_value_has_the_lowest_block_and_the_highest_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, -1.0]) == "█▁"


def test_equal_values_and_none_at_all() -> None:
    assert sparkline([2.0, 2.0, 2.0]) == "▁▁▁"
    assert sparkline([]) == ""


def test_more_values_than_columns_are_averaged_in_order() -> None:
    line = sparkline([float(number) for number in range(1000)], width=10)
    assert len(line) == 10 and list(line) == sorted(line)
    assert sparkline([0.0, 10.0, 0.0, 10.0], width=2) == "▁▁"
