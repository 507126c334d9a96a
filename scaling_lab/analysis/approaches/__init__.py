"""The three approaches of Hoffmann et al. 2022 (arXiv 2203.15556): envelope, IsoFLOP, parametric. All return `Estimate`."""

from __future__ import annotations

from scaling_lab.analysis.approaches.envelope.envelope import Envelope, EnvelopeSettings
from scaling_lab.analysis.approaches.isoflop.isoflop import IsoFlop, IsoFlopSettings
from scaling_lab.analysis.approaches.parametric import Parametric, ParametricSettings

__all__ = ["Envelope", "EnvelopeSettings", "IsoFlop", "IsoFlopSettings", "Parametric", "ParametricSettings"]
