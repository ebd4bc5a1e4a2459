"""outfluence: influence functions, out of core.

Names are loaded when they are first used, so that reading a store needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

__version__ = importlib.metadata.version("outfluence")

_HOME = {
    "BlockMode": "modes",
    "DaskInfluenceCalculator": "calculators",
    "Data": "data",
    "DirectInfluence": "influence",
    "EkfacInfluence": "influence",
    "FisherMode": "modes",
    "InfluenceMode": "modes",
    "Plan": "plan",
    "Problem": "problem",
    "SecondOrderMode": "modes",
    "SequentialInfluenceCalculator": "calculators",
    "Store": "store",
    "open_influences": "analysis",
    "top_k": "analysis",
}

__all__ = [
    "BlockMode",
    "DaskInfluenceCalculator",
    "Data",
    "DirectInfluence",
    "EkfacInfluence",
    "FisherMode",
    "InfluenceMode",
    "Plan",
    "Problem",
    "SecondOrderMode",
    "SequentialInfluenceCalculator",
    "Store",
    "open_influences",
    "top_k",
]

if TYPE_CHECKING:
    from outfluence.analysis import open_influences, top_k
    from outfluence.calculators import DaskInfluenceCalculator, SequentialInfluenceCalculator
    from outfluence.data import Data
    from outfluence.influence import DirectInfluence, EkfacInfluence
    from outfluence.modes import BlockMode, FisherMode, InfluenceMode, SecondOrderMode
    from outfluence.plan import Plan
    from outfluence.problem import Problem
    from outfluence.store import Store


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'outfluence' has no attribute {name!r}")
    return getattr(importlib.import_module(f"outfluence.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
