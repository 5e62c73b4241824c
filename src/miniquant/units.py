"""Numbers as people read them."""


def size(count: float) -> str:
    """Bytes: 960 B, 12.3 kB, 4.56 GB, with three digits and powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} TB"


def duration(seconds: float) -> str:
    """Seconds: 42 ms, 12.3 s, 4 min 05 s, 3 h 20 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.95:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def loss(value: float | None) -> str:
    """A loss in three digits, or a dash where there is none."""
    if value is None:
        return "–"  # noqa: RUF001  (a dash that is as wide as a number)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """A loss relative to another one."""
    return "–" if value is None else f"{value:.3f}"  # noqa: RUF001


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
