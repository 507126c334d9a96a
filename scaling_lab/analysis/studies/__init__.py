"""Studies: questions beyond the three approaches, one module each. A study is found by scanning: there is no list to edit.

What several studies need is in `shared/`.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from scaling_lab.core.errors import STRICT_VARIABLE, UserError, unknown

if TYPE_CHECKING:
    from scaling_lab.analysis.finding import Finding
    from scaling_lab.analysis.studies.base import Study, StudyInput

NO_STUDY = "none"
"""The value of `study=` that runs no study."""
_log = logging.getLogger(__name__)


@cache
def studies_by_name() -> dict[str, Any]:
    """Name -> module, of every module of this package that has a `find`."""
    modules = {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if not info.ispkg
    }
    return {name: module for name, module in sorted(modules.items()) if hasattr(module, "find")}


def study_names() -> tuple[str, ...]:
    """Names of the studies, in alphabetical order."""
    return tuple(studies_by_name())


def get_study(name: str) -> Study:
    """The study called `name`. Raises `UserError` for an unknown name."""
    if name not in studies_by_name():
        raise unknown("study", name, (*study_names(), NO_STUDY))
    return cast("Study", studies_by_name()[name])


def find_all(given: StudyInput) -> tuple[Finding, ...]:
    """What every study finds whose data are there, or the one that `settings.study` names.

    Raises:
        UserError: the study named does not exist, or its data are not there.
    """
    wanted = given.settings.study
    if wanted == NO_STUDY:
        return ()
    if wanted is None:
        found = (_find(name, given) for name in study_names())
        return tuple(finding for finding in found if finding is not None)
    study = get_study(wanted)
    finding = _find(wanted, given)
    if finding is None:
        raise UserError(f"study={wanted}: its data are missing. It needs {study.NEEDS}.")
    return (finding,)


def _find(name: str, given: StudyInput) -> Finding | None:
    """What one study finds. Its bug is a finding of its own: the rest of the analysis must not be lost with it."""
    from scaling_lab.analysis.finding import Finding, FindingStatus

    study = get_study(name)
    try:
        return study.find(given)
    except UserError:
        raise
    except Exception as error:
        if os.environ.get(STRICT_VARIABLE):
            raise
        _log.error("the study %s failed", name, exc_info=error)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(
            name=name,
            title=name.replace("_", " ").capitalize(),
            question=study.QUESTION,
            answer="The study could not be completed.",
            status=FindingStatus.FAILED,
            reason=f"{what}. This is a bug in scaling-lab; please report it.",
        )
