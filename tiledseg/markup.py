"""Pages of HTML: no scripts, nothing loaded from elsewhere, readable in light and dark.

Everything put into one is escaped, for names of images and channels are not to be trusted.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from .pictures import SCALE

__all__ = ["document", "escaped", "figures", "map_of", "pairs", "picture", "section", "table"]

Rows = Iterable[Sequence[object]]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
GRADIENT = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in SCALE)
STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #d8dee4; --back: #f4f6f8; --card: #fff;
  --mark: #2f6db3; --bad: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ec; --soft: #9aa6b1; --line: #333c45; --back: #12161a;
  --card: #1b2127; --mark: #6aa5e3; --bad: #ff8a80; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: .95rem; margin: 0 0 .5rem; }}
p {{ margin: .3rem 0; color: var(--soft); overflow-wrap: anywhere; }}
.figures {{ display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1rem 0; }}
.figures b {{ display: block; color: var(--ink); font-size: 1.5rem; font-weight: 600; }}
.figures span {{ color: var(--soft); }}
main {{ columns: 25rem; column-gap: 1rem; }}
section {{ break-inside: avoid; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1rem; margin: 0 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .15rem 0 .15rem .8rem; vertical-align: top; }}
th {{ color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
table.pairs td:first-child {{ color: var(--soft); width: 38%; }}
table.pairs td:last-child {{ overflow-wrap: anywhere; }}
table.lines td {{ text-align: left; }}
table.lines td:first-child {{ color: var(--soft); white-space: nowrap; }}
td.bar {{ width: 30%; vertical-align: middle; }}
td.bar div {{ background: var(--mark); height: .55rem; border-radius: 2px; }}
.map {{ width: 100%; max-height: 30rem; object-fit: contain; image-rendering: pixelated; display: block; }}
.place {{ width: 100%; display: block; image-rendering: pixelated; border-radius: 4px; }}
svg {{ width: 100%; display: block; }}
.scale {{ height: .6rem; border-radius: 3px; margin-top: .6rem; background: linear-gradient(to right, {GRADIENT}); }}
.ends {{ display: flex; justify-content: space-between; color: var(--soft); }}
.bad {{ color: var(--bad); }}
"""


def document(title: str, paragraphs: Iterable[str], head: str, sections: Iterable[str]) -> str:
    """A whole page.

    Parameters
    ----------
    title : str
    paragraphs : iterable of str
        Text below the title.
    head : str
        HTML above the sections.
    sections : iterable of str
        HTML, see `section`.

    Returns
    -------
    page : str
    """
    lines = "\n".join(f"<p>{escaped(line)}</p>" for line in paragraphs)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n<h1>{escaped(title)}</h1>\n"
        f"{lines}\n{head}\n<main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def escaped(value: object) -> str:
    """Anything, safe within HTML."""
    return html.escape(str(value))


def section(title: str, content: str) -> str:
    """A box with a title above some HTML."""
    return f"<section><h2>{escaped(title)}</h2>{content}</section>"


def table(head: Sequence[str], rows: Rows, shares: Sequence[float] = ()) -> str:
    """A table; with a bar at the end of each row if shares are given."""
    lines = ["<tr>" + "".join(f"<th>{escaped(name)}</th>" for name in head) + "</tr>"]
    for i, row in enumerate(rows):
        cells = [f"<td>{escaped(value)}</td>" for value in row]
        if shares:
            cells.append(f'<td class="bar"><div style="width: {shares[i]:.1%}"></div></td>')
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    shown = ((name, "–" if value is None else value) for name, value in rows)
    lines = (f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>" for name, value in shown)
    return '<table class="pairs">' + "".join(lines) + "</table>"


def figures(shown: Iterable[tuple[str, str]]) -> str:
    """The numbers to see first, each with what it is of."""
    return (
        '<div class="figures">'
        + "".join(f"<span><b>{escaped(n)}</b>{escaped(of)}</span>" for n, of in shown)
        + "</div>"
    )


def picture(png: bytes, alternative: str, kind: str = "map") -> str:
    """A picture within the page; of what is told without it."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="{kind}" alt="{escaped(alternative)}" src="data:image/png;base64,{data}">'


def map_of(png: bytes, alternative: str, ends: tuple[str, str]) -> str:
    """A picture in colours that stand for numbers, with the numbers at either end."""
    low, high = map(escaped, ends)
    scale = f'<div class="scale"></div><div class="ends"><span>{low}</span><span>{high}</span></div>'
    return picture(png, alternative) + scale
