"""A page that stands alone: HTML with its style and its pictures inside, for a screen and for paper.

Convention: what is put into the page is text, and escaped here; only :class:`Html` is taken as it is. No script, no
address of anything outside.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1f2933;
  background: #fff; margin: 0 auto; max-width: 1180px; padding: 28px 28px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 10px; padding-bottom: 5px; border-bottom: 1px solid #dde1e7; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { max-width: 80ch; margin: 6px 0 10px; }
.under { color: #5b6470; margin: 0 0 16px; }
.note { border-left: 4px solid #e0a100; background: #fff9e8; padding: 8px 14px; max-width: none; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.card { border: 1px solid #dde1e7; border-radius: 8px; padding: 9px 14px; min-width: 150px; flex: 1; }
.card b { display: block; font-size: 20px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: #5b6470; font-size: 13px; }
.row { display: grid; gap: 12px; margin: 8px 0 16px; align-items: start; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 13px; color: #3c4550; margin-bottom: 4px; }
figcaption b { color: #1f2933; }
img { width: 100%; display: block; border-radius: 2px; }
.scaled { position: relative; }
.bar { position: absolute; left: 10px; bottom: 9px; height: 0; border-top: 5px solid #fff;
  filter: drop-shadow(0 0 1px #000); }
.bar i { position: absolute; left: 0; bottom: 7px; color: #fff; font: 600 12px/1 sans-serif; white-space: nowrap;
  text-shadow: 0 0 3px #000, 0 0 2px #000; }
table { border-collapse: collapse; margin: 6px 0 14px; font-size: 14px; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #eceff3; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.methods { background: #f6f8fa; border: 1px solid #dde1e7; border-radius: 8px; padding: 12px 16px; max-width: none; }
details { margin: 8px 0; } summary { cursor: pointer; color: #2563a8; }
pre { font-size: 12px; line-height: 1.4; background: #f6f8fa; padding: 12px; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print { body { padding: 0; max-width: none; font-size: 12px; } h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } summary { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def document(title: str, parts: Iterable[Html]) -> str:
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def element(tag: str, content: object, **attributes: object) -> Html:
    """``element("p", "a < b", cls="note")``"""
    shown = "".join(f' {"class" if key == "cls" else key}="{escape(str(v))}"' for key, v in attributes.items())
    return Html(f"<{tag}{shown}>{text(content)}</{tag}>")


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(text(part) for part in parts))


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """(number, what it is), side by side."""
    shown = (element("div", joined([element("b", n), element("span", what)]), cls="card") for n, what in facts)
    return element("div", joined(shown), cls="cards")


def picture(
    data: bytes,
    alt: str,
    *,
    title: str = "",
    more: str = "",
    bar: tuple[float, str] | None = None,
    aspect: float | None = None,
    width: str = "100%",
) -> Html:
    """A PNG with its title. bar: length of a scale bar as a share of the width, and its label; aspect: width over
    height it is shown at, where pixels are not square."""
    shape = f"aspect-ratio: {aspect:.5f};" if aspect else ""
    image = Html(
        f'<img src="data:image/png;base64,{b64encode(data).decode()}" alt="{escape(alt)}" style="{escape(shape)}">'
    )
    if bar:
        label = element("i", bar[1])
        image = element(
            "div", joined([image, element("div", label, cls="bar", style=f"width: {bar[0]:.3%}")]), cls="scaled"
        )
    caption = joined([element("b", title), " " + more if more else ""])
    head = element("figcaption", caption) if title or more else Html("")
    return element("figure", joined([head, image]), style=f"width: {width}; max-width: 100%")


def row(figures: Sequence[Html], columns: str | None = None) -> Html:
    return element(
        "div",
        joined(figures),
        cls="row",
        style=f"grid-template-columns: {columns or f'repeat({len(figures)}, minmax(0, 1fr))'}",
    )


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), numbers: Sequence[int] = ()) -> Html:
    """numbers: columns that are set to the right. Without a head, the first column is one."""

    def cells(values: Sequence[object], tags: Sequence[str]) -> Html:
        shown = (
            element(tag, value, **({"cls": "n"} if i in numbers else {}))
            for i, (tag, value) in enumerate(zip(tags, values, strict=True))
        )
        return element("tr", joined(shown))

    first = "td" if head else "th"
    top = [cells(head, ["th"] * len(head))] if head else []
    body = [cells(values, [first] + ["td"] * (len(values) - 1)) for values in rows]
    return element("table", joined([*top, *body]))
