"""HTML and SVG elements from Python, escaped by construction.

Enters: tag names, attributes and content. Leaves: `Html`, a string that is known to be safe markup. Any plain `str`
that becomes content or an attribute is escaped on the way in, so a sample's text can never turn into markup.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Markup that is already escaped; only `element`, `join` and files of this package make it."""

    __slots__ = ()


NUM_COLORS = 8  # of the page's palette, page.css; later ones repeat them dashed

Content = str | Iterable["Content"] | None


def element(tag: str, *content: Content, **attributes: str | float | bool | None) -> Html:
    """`<tag attributes>content</tag>`; plain strings are escaped, `Html` is kept, None is left out.

    An attribute's `_` becomes `-` and a trailing one is dropped (`class_`, `stroke_width`); True writes the bare name,
    False and None leave it out. Numbers are written with at most two decimals: a hundredth of a pixel.

    >>> element("p", "1 < 2 ", element("b", "so"), class_="note", hidden=False)
    '<p class="note">1 &lt; 2 <b>so</b></p>'
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escape(_text(value))}"')
    start = f"<{' '.join(words)}>"
    return Html(start if tag in _VOID else f"{start}{join(content)}</{tag}>")


def join(content: Content) -> Html:
    """Content in a row: strings escaped, `Html` kept, nested iterables flattened, None left out."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(escape(content, quote=False))
    return Html("".join(join(part) for part in content))


def color_class(kind: str, color: int) -> str:
    """The CSS classes of a mark in the palette's colour: ("line", 1) → "line c1", ("line", 9) → "line c1 dashed"."""
    return f"{kind} c{color % NUM_COLORS}{' dashed' if color >= NUM_COLORS else ''}"


_VOID = frozenset({"meta", "br", "hr", "input", "img"})


def _text(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
