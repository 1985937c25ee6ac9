"""Stage search: an allocation for each budget, as slices of the parent."""

from typing import Any

from matquant.formats.slice_spec import SliceSpec
from matquant.search.context import SearchContext
from matquant.search.stage import search as run_search
from matquant.stages.load import LoadedJob
from matquant.stages.quantize import QuantizedJob
from matquant.stages.runtime import Runtime


def search(job: LoadedJob, quantized: QuantizedJob, runtime: Runtime) -> tuple[list[SliceSpec], dict[str, Any] | None]:
    """Find an allocation for each budget.

    Returns:
        A slice per budget, and the record for the results; nothing and None without a search.
    """
    config = job.config.search
    if job.search is None or quantized.parent is None:
        return [], None
    context = SearchContext(
        blocks=job.blocks,
        parent=quantized.parent,
        sequences=job.search,
        device=runtime.device,
        dtype=job.dtype,
        process_group=runtime.process_group,
    )
    with runtime.bars.bar(f"search {config.name}", len(config.ascending_budgets) + 1) as progress:
        found = run_search(config, context, runtime.store, progress)
    slices = [
        SliceSpec(name=row["file"], parent=quantized.parent, bits=one.bits, allocation=one)
        for row, one in zip(found.record["front"], found.allocations, strict=True)
    ]
    return slices, found.record
