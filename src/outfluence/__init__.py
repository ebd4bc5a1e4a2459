"""outfluence: influence functions, out of core.

Names are loaded when they are first used, so that reading a store needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

__version__ = importlib.metadata.version("outfluence")

_HOME = {
    "ArnoldiInfluence": "methods",
    "Assessment": "assessment",
    "BlockMode": "modes",
    "CgInfluence": "methods",
    "DaskInfluenceCalculator": "calculators",
    "Data": "data",
    "DirectInfluence": "methods",
    "EkfacCgInfluence": "methods",
    "EkfacInfluence": "methods",
    "EkfacPreconditioner": "preconditioners",
    "EnsembleInfluence": "methods",
    "FisherMode": "modes",
    "InfluenceMode": "modes",
    "InverseHarmonicMeanInfluence": "methods",
    "InverseHvpResult": "functional",
    "JacobiPreconditioner": "preconditioners",
    "KernelMode": "modes",
    "LissaInfluence": "methods",
    "NystroemPreconditioner": "preconditioners",
    "NystroemSketchInfluence": "methods",
    "Plan": "plan",
    "Problem": "problem",
    "ProjectedInfluence": "methods",
    "Projection": "modes",
    "SecondOrderMode": "modes",
    "SequentialInfluenceCalculator": "calculators",
    "Store": "store",
    "TorchTwiceDifferentiable": "functional",
    "TracInInfluence": "methods",
    "WeightSharing": "modes",
    "assess": "assessment",
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
    "Assessment",
    "BlockMode",
    "CgInfluence",
    "DaskInfluenceCalculator",
    "Data",
    "DirectInfluence",
    "EkfacCgInfluence",
    "EkfacInfluence",
    "EkfacPreconditioner",
    "EnsembleInfluence",
    "FisherMode",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "InverseHvpResult",
    "JacobiPreconditioner",
    "KernelMode",
    "LissaInfluence",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "Plan",
    "Problem",
    "ProjectedInfluence",
    "Projection",
    "SecondOrderMode",
    "SequentialInfluenceCalculator",
    "Store",
    "TorchTwiceDifferentiable",
    "TracInInfluence",
    "WeightSharing",
    "assess",
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
    from outfluence.assessment import Assessment, assess
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
    from outfluence.methods import (
        ArnoldiInfluence,
        CgInfluence,
        DirectInfluence,
        EkfacCgInfluence,
        EkfacInfluence,
        EnsembleInfluence,
        InverseHarmonicMeanInfluence,
        LissaInfluence,
        NystroemSketchInfluence,
        ProjectedInfluence,
        TracInInfluence,
    )
    from outfluence.modes import (
        BlockMode,
        FisherMode,
        InfluenceMode,
        KernelMode,
        Projection,
        SecondOrderMode,
        WeightSharing,
    )
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
