"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A Markdown table without a final newline; with `numbers`, all columns but the first are right-aligned."""
    rule = "| --- |" + " ---: |" * (len(header) - 1) if numbers else "|---" * len(header) + "|"
    first, *others = (f"| {' | '.join(line)} |" for line in (header, *rows))
    return "\n".join([first, rule, *others])
