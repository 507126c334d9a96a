"""From a matplotlib figure to files and to SVG inside a page: small, self-contained, the same every time."""

from __future__ import annotations

import html
import io
import re

from matplotlib.figure import Figure

# Drawing units (1/72 inch) to keep: a hundredth is finer than any screen or printer shows.
_DECIMALS = 2
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
PNG_DPI = 160


def to_svg(figure: Figure) -> str:
    """The figure as SVG text with a transparent ground and no date in it. Call inside `figure_style()`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # The layout is found once: other formats keep it.
    figure.set_layout_engine("none")
    return _shorten(buffer.getvalue())


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes on white. Call inside `figure_style()`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def on_white(svg: str) -> str:
    """The SVG with a white ground, for a file of its own: dark ink would vanish in a dark viewer."""
    return re.sub(r"(<svg\b[^>]*>)", r'\1\n <rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)


def inline(svg: str, name: str, alt: str) -> str:
    """The SVG as an element of a page: named for screen readers, with ids of its own, sized by the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    body = _own_ids(body.replace("xlink:href=", "href="), name)
    view = re.search(r'viewBox="([^"]+)"', body)
    box = view.group(1) if view else "0 0 504 300"
    opening = (
        f'<svg viewBox="{box}" xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{name}-alt">'
        f'<title id="{name}-alt">{html.escape(alt)}</title>'
    )
    body = re.sub(r"<svg\b[^>]*>", lambda _: opening, body, count=1)
    return re.sub(r"\n\s*", "\n", body).strip()


def _own_ids(body: str, name: str) -> str:
    """Short ids that no other figure of the page has, or one would use another's clips and glyphs; unused ones go."""
    used = dict.fromkeys(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    short = "".join(word[0] for word in name.split("_"))
    new = {old: f"{short}-{i:x}" for i, old in enumerate(dict.fromkeys(a or b for a, b in used))}
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{new[m[1]]}"' if m[1] in new else "", body)
    body = re.sub(r'href="#([^"]+)"', lambda m: f'href="#{new[m[1]]}"', body)
    return re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{new[m[1]]})", body)


def _shorten(svg: str) -> str:
    """Coordinates to `_DECIMALS`; glyph outlines (in <defs>, scaled down) and transforms stay as they are."""

    def rounded(match: re.Match[str]) -> str:
        return _NUMBER.sub(
            lambda m: f"{float(m.group()):.{_DECIMALS}f}".rstrip("0").rstrip("."), match.group()
        )

    out = []
    for part in re.split(r"(<defs>.*?</defs>)", svg, flags=re.S):
        if not part.startswith("<defs>"):
            part = re.sub(r'\b(?:d|x|y|x1|x2|y1|y2|points)="[^"]*"', rounded, part)
            part = re.sub(r"translate\([^)]*\)", rounded, part)
            part = re.sub(r'="[^"]*"', lambda m: m.group().replace(" \n", " ").replace("\n", " "), part)
        out.append(part)
    return "".join(out)
