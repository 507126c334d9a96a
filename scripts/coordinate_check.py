#!/usr/bin/env python
"""Coordinate check: sizes of activations and of their changes after a few real steps, over width and over depth, under every
parametrization, as a table and a figure.

    scripts/coordinate_check.py                        model=gpt, about a minute on one core
    scripts/coordinate_check.py --model gpt2 --lr 0.005
    scripts/coordinate_check.py --out FOLDER           also writes coordinate_check_MODEL.{txt,svg,png} there

An exponent of 0 is flat: under the parametrization, single coordinates keep their size as the model grows. The data are the
first megabyte of the Python standard library's source. tests/test_coordinates.py asserts the same for every family.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

from scaling_lab.analysis.text import significant
from scaling_lab.core.parametrization import STANDARD, CompleteP, MuP
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import shape_class
from scaling_lab.reporting.style import figure_style, log_axis
from scaling_lab.reporting.svg import on_white, to_png, to_svg
from scaling_lab.training.measure.coordinates import (
    BRANCHES,
    LOGITS,
    QUANTITIES,
    STEPS,
    STREAM,
    Coordinates,
    growth,
    measure,
    shapes_along,
)

HEAD_DIM = 16
# The lines of the stream and of the branches overlap, so the lower one is drawn wider.
LINE_WIDTHS = {STREAM: 5.0, BRANCHES: 1.4, LOGITS: 1.4}
COLORS = {STREAM: "#0072b2", BRANCHES: "#d55e00", LOGITS: "#008f6b"}
AXES = ("width", "depth")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt", help="a model family (default gpt)")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="multiples of 16, ascending"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16], help="ascending")
    parser.add_argument("--lr", type=float, default=0.01, help="peak LR at the smallest width and depth")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for the table and the figure")
    options = parser.parse_args()
    if any(w % HEAD_DIM for w in options.widths) or min(options.widths + options.depths) < 1:
        parser.error(
            f"--widths {options.widths} must be multiples of {HEAD_DIM}, --depths {options.depths} at least 1"
        )
    # Models this small are faster on one thread, which also makes the numbers independent of the number of cores.
    torch.set_num_threads(1)
    found = check(options)
    text = table(found, options)
    print(text, end="")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / f"coordinate_check_{options.model}", text, found)


def check(options: argparse.Namespace) -> dict[tuple[str, str], list[Coordinates]]:
    """(parametrization, width or depth) -> measurements along it."""
    tokens = PySource(max_mb=1.0).tokens("train")
    width, depth = options.widths[0], options.depths[0]
    shape = shape_class(options.model)(width=width, depth=depth, heads=width // HEAD_DIM, context=32)
    kinds: list[Any] = [
        STANDARD, MuP(width, HEAD_DIM), CompleteP(base_width=width, base_head_dim=HEAD_DIM, base_depth=depth)
    ]  # fmt: skip
    sizes = {
        "width": shapes_along(shape, widths=options.widths),
        "depth": shapes_along(shape, depths=options.depths),
    }
    found = {}
    for kind in kinds:
        for by in AXES:
            print(f"  measuring {kind.kind} over {by} ...", end="\r", flush=True)
            found[kind.kind, by] = [
                measure(s, kind, tokens, peak_lr=options.lr, steps=options.steps, seeds=range(options.seeds))
                for s in sizes[by]
            ]
    print(" " * 60, end="\r")
    return found


def table(found: dict[tuple[str, str], list[Coordinates]], options: argparse.Namespace) -> str:
    """The table of changes at every size, and the exponents of changes and sizes."""
    lines = [
        f"coordinate check of {options.model}: {options.steps} steps at a base LR of {options.lr:g}, {options.seeds} seeds, torch {torch.__version__}",
        "root mean square change of a coordinate at each size; exponents of the change and of the size (0 is flat)",
        f"{'':10} {'':6} {'':18} {'change at the sizes':44} change    size",
    ]
    for (kind, by), points in found.items():
        for name in QUANTITIES:
            values = " ".join(f"{getattr(p, by):>4}:{significant(p.change[name], 3):<6}" for p in points)
            change = growth(points, by, lambda p, q=name: p.change[q])
            size = growth(points, by, lambda p, q=name: p.size[q])
            lines.append(f"{kind:10} {by:6} {name:18} {values:44} {change:+.2f}   {size:+.2f}")
    return "\n".join(lines) + "\n"


def write(stem: Path, text: str, found: dict[tuple[str, str], list[Coordinates]]) -> None:
    stem.with_suffix(".txt").write_text(text, encoding="utf-8")
    with figure_style():
        figure = Figure(figsize=(6.4, 4.6))
        draw(figure, found)
        stem.with_suffix(".svg").write_text(on_white(to_svg(figure)), encoding="utf-8")
        stem.with_suffix(".png").write_bytes(to_png(figure))
    print(f"written: {stem}.txt, .svg, .png")


def draw(figure: Figure, found: dict[tuple[str, str], list[Coordinates]]) -> None:
    """One column per parametrization, width above and depth below; lines are changes, with their exponents."""
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    axes = figure.subplots(2, len(kinds), sharey=True)
    values = [p.change[name] for points in found.values() for p in points for name in QUANTITIES]
    for (kind, by), points in found.items():
        ax = axes[AXES.index(by), kinds.index(kind)]
        sizes: Sequence[int] = [getattr(p, by) for p in points]
        for name in QUANTITIES:
            exponent = growth(points, by, lambda p, q=name: p.change[q])
            changes = [p.change[name] for p in points]
            ax.plot(sizes, changes, **looks(name), label=f"{exponent:+.2f}")
        log_axis(ax, "x", sizes[0], sizes[-1], lambda v: f"{v:g}", most=4)
        ax.xaxis.set_major_locator(FixedLocator(sizes))
        ax.xaxis.set_major_formatter(FixedFormatter([str(size) for size in sizes]))
        ax.set_xlabel(by)
        ax.legend(loc="upper left", fontsize=7.5, title="exponent", title_fontsize=7.5)
        if by == "width":
            ax.set_title(kind)
        if kind == kinds[0]:
            ax.set_ylabel("change of a coordinate")
    log_axis(axes[0, 0], "y", min(values), max(values), lambda v: significant(v, 2), most=5)
    handles = [axes[0, 0].plot([], [], **looks(name), label=name)[0] for name in QUANTITIES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(QUANTITIES))


def looks(name: str) -> dict[str, Any]:
    return {
        "marker": "o",
        "ms": 3.5,
        "color": COLORS[name],
        "lw": LINE_WIDTHS[name],
        "alpha": 0.4 if name == STREAM else 1.0,
    }


if __name__ == "__main__":
    main()
