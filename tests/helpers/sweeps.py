"""Settings of a small sweep for the planner."""

from __future__ import annotations

from dataclasses import replace

from scaling_lab.core.schedules import Cosine
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.settings import ModelSettings, SweepSettings


def settings(**changes) -> SweepSettings:
    base = SweepSettings(
        sweep="t",
        design=IsoFlopDesign(),
        recipe=DefaultRecipe(),
        model=ModelSettings(),
        data=PySource(),
        schedule=Cosine(),
    )
    return replace(base, **changes)
