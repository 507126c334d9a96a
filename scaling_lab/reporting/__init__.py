"""The report: figures as functions from data to axes, and one self-contained HTML page. The only zone with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_lab.reporting.page import report_from_json, write_report

__all__ = ["report_from_json", "write_report"]


def __getattr__(name: str) -> Any:
    """The functions are loaded when asked for: importing the package alone stays free of matplotlib."""
    if name in __all__:
        from scaling_lab.reporting import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
