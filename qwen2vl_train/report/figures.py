"""How figures read: metric names in words, numbers short enough for a tile, a table cell or an axis.

Enters: numbers as the run wrote them (None and NaN where there is none). Leaves: text; a missing figure is "–".
"""

from __future__ import annotations

import math
from typing import TypeGuard

MISSING = "–"

_METRICS = {
    "caption_exact": "Caption, exact match",
    "referring_acc50": "Referring, Acc@0.5",
    "ocr_exact": "OCR, exact match",
    "vqa_accuracy": "VQA accuracy",
    "clip_direction": "Clip direction",
}
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def metric_title(name: str) -> str:
    """A held-out metric's name in words; an unknown one keeps its own words ("region_exact" → "Region exact")."""
    words = name.replace("_", " ")
    return _METRICS.get(name) or words[:1].upper() + words[1:]


def is_number(value: object) -> TypeGuard[float]:
    """A finite int or float (bool is none, nor is an int beyond the floats, 10**400)."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def percent(share: object, decimals: int = 1) -> str:
    """A share from 0 to 1: 0.4567 → "45.7%"."""
    return f"{100 * share:.{decimals}f}%" if is_number(share) else MISSING


def points(difference: object) -> str:
    """A difference of shares in percentage points, signed: 0.25 → "+25.0"."""
    return f"{100 * difference:+.1f}" if is_number(difference) else MISSING


def amount(value: object) -> str:
    """Three significant digits with a unit prefix: 1234567 → "1.23M", 950 → "950", 0.00042 → "4.2e-4"."""
    if not is_number(value):
        return MISSING
    size = abs(value)
    for scale, letter in _SCALES:
        if size >= 0.9995 * scale:
            return f"{_significant(value / scale)}{letter}"
    if size and size < 9.995e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return _significant(value)


def count(value: object) -> str:
    """A whole number with thousands separated: 12345 → "12,345"."""
    return f"{value:,.0f}" if is_number(value) else MISSING


def loss(value: object) -> str:
    """A loss in nats per supervised token, three decimals below 10."""
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}") if is_number(value) else MISSING


def duration(seconds: object) -> str:
    """Seconds in words of two units at most: 95 → "1 min 35 s", 7300 → "2 h 2 min"."""
    if not is_number(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    if whole < 3570:
        return f"{round(whole / 60)} min"
    hours, minutes = divmod(round(whole / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def _significant(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text
