"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from merge_kit.errors import UsageError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[_letter + "B"] = 1000**_power
    _UNITS[_letter + "IB"] = 1024**_power

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?(?:I?B)?)\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """Return bytes: `5GB` and `5G` are decimal, `2GiB` is binary, a plain number is bytes.

    Raises:
        UsageError: If the text is no size, or not above 0.
    """
    match = _SIZE.fullmatch(str(text))
    value = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if value <= 0:
        raise UsageError(
            f"{str(text)[:40]!r} is no size", hint="write for example 500MB, 5GB or 2GiB"
        )
    return value


def format_size(size_bytes: int) -> str:
    """Return a size with three digits and a decimal unit, for example `2.47 GB`."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def format_count(count: int) -> str:
    """Return a count with three digits, for example `1.24 B` for 1,240,000,000."""
    value = float(count)
    for unit in ("", " K", " M", " B", " T"):
        if value < 999.5 or unit == " T":
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError("unreachable")
