"""Matryoshka post-training quantization of language models: every slice of one 8-bit parent is a good model."""

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    __version__: str

    from matquant.transformers.speculation import speculate as speculate


@wrapt.when_imported("transformers.modeling_utils")
def _register(_module: object) -> None:
    """Register packed checkpoints with Transformers. Deferred until Transformers is imported, which takes seconds."""
    from matquant.transformers import register

    register()


def __getattr__(name: str) -> Any:
    """Public names that are costly to load: Transformers takes seconds to import, and the version may need git."""
    if name == "__version__":
        from matquant.version import version

        return version()
    if name == "speculate":
        from matquant.transformers.speculation import speculate

        return speculate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
