"""Search methods by the value of ``search.method``; ``none``, which is not in the registry, means no search.

To add a method: one file with a subclass of ``SearchMethod``, one line in ``SEARCH_METHODS``, one preset in
``conf/search``.
"""

from matquant.search.methods.evolution_search import EvolutionSearch
from matquant.search.methods.hybrid_search import HybridSearch
from matquant.search.methods.search_method import BudgetTask, Finalists, SearchMethod
from matquant.search.methods.sensitivity_search import SensitivitySearch

SEARCH_METHODS: dict[str, type[SearchMethod]] = {
    "sensitivity": SensitivitySearch,
    "evolve": EvolutionSearch,
    "hybrid": HybridSearch,
}

__all__ = ["SEARCH_METHODS", "BudgetTask", "Finalists", "SearchMethod"]
