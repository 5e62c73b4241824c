"""Regular expressions for many layer names: a model of 100 blocks is described by as many as a model of one."""

import re
from collections.abc import Iterable
from typing import NamedTuple

Strings = tuple[str, ...]


class NamePattern(NamedTuple):
    """Some names, and a regular expression that matches them from their first to their last character.

    Attributes:
        expression: begins with ``^`` and ends with ``$``.
        names: what it was made for; it may match further numbers in their places.
    """

    expression: str
    names: tuple[str, ...]


def name_patterns(wanted: Iterable[str], others: Iterable[str]) -> list[NamePattern]:
    r"""Patterns that together match every name of ``wanted`` and none of ``others``.

    Names that differ in whole numbers only ("h.0.fc", "h.1.fc") share a pattern: with ``\d+`` for the numbers where no
    name of ``others`` is of the same form, otherwise with the numbers spelled out.
    """
    forms: dict[Strings, list[tuple[Strings, str]]] = {}
    for name in dict.fromkeys(wanted):
        texts, numbers = _split(name)
        forms.setdefault(texts, []).append((numbers, name))
    taken = {_split(name)[0] for name in others}
    patterns = []
    for texts, members in forms.items():
        names = dict(members)
        if not members[0][0] or len(names) == 1:
            patterns += [NamePattern(f"^{re.escape(name)}$", (name,)) for name in names.values()]
        elif texts not in taken:
            expression = r"\d+".join(re.escape(text) for text in texts)
            patterns.append(NamePattern(f"^{expression}$", tuple(names.values())))
        else:
            for fields in _products(set(names)):
                matched = [name for numbers, name in names.items() if _matches(fields, numbers)]
                parts = [re.escape(texts[0])]
                for field, text in zip(fields, texts[1:], strict=True):
                    parts += [field[0] if len(field) == 1 else f"(?:{'|'.join(field)})", re.escape(text)]
                patterns.append(NamePattern(f"^{''.join(parts)}$", tuple(matched)))
    return patterns


def _split(name: str) -> tuple[Strings, Strings]:
    """The texts around the parts of a name that are whole numbers, and these: one text more than numbers."""
    pieces = re.split(r"(?:^|(?<=\.))(\d+)(?=\.|$)", name)
    return tuple(pieces[::2]), tuple(pieces[1::2])


def _matches(fields: list[list[str]], numbers: Strings) -> bool:
    return all(number in field for field, number in zip(fields, numbers, strict=True))


def _products(tuples: set[Strings]) -> list[list[list[str]]]:
    """Tuples of numbers as products of lists: {(0, 1), (0, 2), (3, 1), (3, 2)} is [[0, 3], [1, 2]]."""
    if tuples == {()}:
        return [[]]
    rests: dict[str, set[Strings]] = {}
    for first, *rest in tuples:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[Strings], list[str]] = {}
    for first in sorted(rests, key=lambda number: (len(number), number)):
        firsts.setdefault(frozenset(rests[first]), []).append(first)
    return [[alike, *tail] for rest, alike in firsts.items() for tail in _products(set(rest))]
