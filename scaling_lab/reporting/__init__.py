"""The report: figures as functions from data to axes, and one self-contained HTML page. The only zone with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_lab.reporting.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """`write_report` is loaded when asked for: importing the package alone stays free of matplotlib."""
    if name == "write_report":
        from scaling_lab.reporting.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
