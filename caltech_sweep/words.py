"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """Return "1 study" or "3 studies"; ``many`` is for plurals that are not made with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
