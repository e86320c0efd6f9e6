"""Texts in messages: short, printable, whatever they are made of."""

import pytest

from tinysr_kernels.errors import shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("conv_in.weight", "conv_in.weight"),
        ("größe 画像", "größe 画像"),
        ("a\x1b[2J\r\nb", r"a\x1b[2J\r\nb"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("caf\udce9", r"caf\udce9"),
        (b"\x00", r"b'\x00'"),
        (12, "12"),
        (None, "None"),
        ("", ""),
    ],
)
def test_texts_are_printable(text: object, shown: str) -> None:
    assert shorten(text) == shown


@pytest.mark.parametrize("text", ["x" * 10**7, "\x1b" * 10**7, "\U0010ffff" * 50, [0] * 10**5, "ab" + "\n" * 300])
@pytest.mark.parametrize("limit", [5, 6, 20, 200])
def test_texts_are_short(text: object, limit: int) -> None:
    shown = shorten(text, limit)
    assert limit - 30 < len(shown) <= limit
    assert shown.isprintable()
    assert "..." in shown


def test_both_ends_of_a_text_are_shown() -> None:
    assert shorten("0123456789" * 3, 10) == "0123...789"
    assert shorten("\n" * 10, 10) == r"\n\n...\n"
    assert shorten("0123456789", 10) == "0123456789"


def test_what_cannot_be_written_is_named() -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError

    assert shorten(Hostile()) == "<Hostile>"
    assert shorten(10**5000) == "<int>"
