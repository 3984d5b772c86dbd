"""Tables of text."""

from solo_gating.texts import aligned


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["block", "channels", "FLOPs"], ["stem", "", "1,024"], ["layer1.0", "64", "7"]]
    assert aligned(rows) == [
        "block     channels  FLOPs",
        "stem                1,024",
        "layer1.0        64      7",
    ]


def test_first_columns_are_on_the_left_and_short_rows_end_early():
    rows = [["a", "bb", "1"], ["aaa", "b", "100", "*"], ["a"]]
    assert aligned(rows, left=2) == ["a    bb    1", "aaa  b   100  *", "a"]
