"""HTML elements that escape plain text automatically."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

_VOID = {"br", "input", "link", "meta"}
# No script, no request, whatever the data says; styles and the empty icon are inside the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """Text that is HTML, and is not escaped again."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | None) -> Markup:
    """Element ``<tag attributes>children</tag>``; children that are not `Markup`, and all attributes, are escaped.

    A trailing underscore of a name is dropped (``class_``), others become hyphens; an attribute of None is left out.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    start = "".join(f' {name}="{html.escape(value)}"' for name, value in given.items())
    if tag in _VOID:
        return Markup(f"<{tag}{start}>")
    return Markup(f"<{tag}{start}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """Join children, escaped unless they are `Markup`."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children))


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1, class_: str | None = None
) -> Markup:
    """Table that scrolls if it is too wide; columns after the first ``text_columns`` hold numbers."""
    kind = ["text" if index < text_columns else "number" for index in range(len(header))]
    head = element("tr", *(element("th", cell, class_=k, scope="col") for cell, k in zip(header, kind, strict=True)))
    body = [element("tr", *(element("td", c, class_=k) for c, k in zip(row, kind, strict=True))) for row in rows]
    inner = element("table", element("thead", head), element("tbody", *body), class_=class_)
    return element("div", inner, class_="scroll", tabindex="0")


def figure(svg: str, caption: str, **attributes: str) -> Markup:
    """Figure: an SVG drawing and its caption."""
    return element("figure", Markup(svg), element("figcaption", caption), **attributes)


def section(title: str, *children: str) -> Markup:
    return element("section", element("h2", title), *children)


def page(title: str, *body: str) -> str:
    """Self-contained HTML document."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            element("link", rel="icon", href="data:,"),
            element("style", Markup(css)),
        ]
    )
    main = element("main", *(Markup(part + "\n") if isinstance(part, Markup) else part for part in body))
    return "<!doctype html>\n" + element("html", element("head", head), "\n", element("body", main), lang="en") + "\n"
