"""Figures as people read them."""

from __future__ import annotations

import pytest

from vlmrt.tools.admin.figures import aligned, bytes_text, count_text, plural, seconds_text, share_text, shortened


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0.0 ms"),
        (0.00044, "0.4 ms"),
        (0.0096, "10 ms"),
        (0.0874, "87 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (3.214, "3.21 s"),
        (9.996, "10.0 s"),
        (14.2, "14.2 s"),
        (59.96, "1 min 0 s"),
        (425, "7 min 5 s"),
        (11_520, "3 h 12 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0"),
        (812, "812 B"),
        (1000, "1.0 KiB"),
        (1_572_864, "1.5 MiB"),
        (125_829_120, "120 MiB"),
        (1_048_000_000, "999 MiB"),
        (8_500_000_000, "7.9 GiB"),
        (3 << 40, "3.0 TiB"),
        (3 << 52, "12288 TiB"),
    ],
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert bytes_text(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (0.4, "0.4"), (7, "7"), (12.4, "12"), (9999, "9,999"), (12_345, "12.3k"), (4_500_000, "4.5M")],
)
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


def test_shares_plurals_and_what_is_too_long() -> None:
    assert (share_text(None), share_text(0.444)) == ("-", "44 %")
    assert (plural(1, "image"), plural(1234, "image")) == ("1 image", "1,234 images")
    assert (shortened("abcdef", 6), shortened("abcdefg", 6)) == ("abcdef", "abcde…")


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "n", "place"), ("a", "100", "here"), ("long name", "7", "x")]
    assert aligned(rows, left=(0, 2)) == ["name         n  place", "a          100  here", "long name    7  x"]
