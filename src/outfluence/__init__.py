"""outfluence: influence functions, out of core.

Names are loaded when they are first used, so that reading a store needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

__version__ = importlib.metadata.version("outfluence")

_HOME = {
    "ArnoldiInfluence": "influence",
    "BlockMode": "modes",
    "CgInfluence": "influence",
    "DaskInfluenceCalculator": "calculators",
    "Data": "data",
    "DirectInfluence": "influence",
    "EkfacCgInfluence": "influence",
    "EkfacInfluence": "influence",
    "EkfacPreconditioner": "preconditioners",
    "FisherMode": "modes",
    "WeightSharing": "modes",
    "InfluenceMode": "modes",
    "InverseHarmonicMeanInfluence": "influence",
    "InverseHvpResult": "functional",
    "JacobiPreconditioner": "preconditioners",
    "LissaInfluence": "influence",
    "NystroemPreconditioner": "preconditioners",
    "NystroemSketchInfluence": "influence",
    "Plan": "plan",
    "Problem": "problem",
    "SecondOrderMode": "modes",
    "SequentialInfluenceCalculator": "calculators",
    "Store": "store",
    "TorchTwiceDifferentiable": "functional",
    "compute_influence_factors": "functional",
    "compute_influences": "functional",
    "compute_linear_influences": "functional",
    "open_history": "analysis",
    "open_influences": "analysis",
    "solve_hvp": "functional",
    "top_k": "analysis",
}

__all__ = [
    "ArnoldiInfluence",
    "BlockMode",
    "CgInfluence",
    "DaskInfluenceCalculator",
    "Data",
    "DirectInfluence",
    "EkfacCgInfluence",
    "EkfacInfluence",
    "EkfacPreconditioner",
    "FisherMode",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "InverseHvpResult",
    "JacobiPreconditioner",
    "LissaInfluence",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "Plan",
    "Problem",
    "SecondOrderMode",
    "SequentialInfluenceCalculator",
    "Store",
    "TorchTwiceDifferentiable",
    "WeightSharing",
    "compute_influence_factors",
    "compute_influences",
    "compute_linear_influences",
    "open_history",
    "open_influences",
    "solve_hvp",
    "top_k",
]

if TYPE_CHECKING:
    from outfluence.analysis import open_history, open_influences, top_k
    from outfluence.calculators import DaskInfluenceCalculator, SequentialInfluenceCalculator
    from outfluence.data import Data
    from outfluence.functional import (
        InverseHvpResult,
        TorchTwiceDifferentiable,
        compute_influence_factors,
        compute_influences,
        compute_linear_influences,
        solve_hvp,
    )
    from outfluence.influence import (
        ArnoldiInfluence,
        CgInfluence,
        DirectInfluence,
        EkfacCgInfluence,
        EkfacInfluence,
        InverseHarmonicMeanInfluence,
        LissaInfluence,
        NystroemSketchInfluence,
    )
    from outfluence.modes import BlockMode, FisherMode, InfluenceMode, SecondOrderMode, WeightSharing
    from outfluence.plan import Plan
    from outfluence.preconditioners import EkfacPreconditioner, JacobiPreconditioner, NystroemPreconditioner
    from outfluence.problem import Problem
    from outfluence.store import Store


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'outfluence' has no attribute {name!r}")
    return getattr(importlib.import_module(f"outfluence.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
