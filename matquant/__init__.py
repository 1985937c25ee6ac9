"""Matryoshka post-training quantization of language models: every slice of one 8-bit parent is a good model."""

import wrapt

from matquant.version import __version__ as __version__


@wrapt.when_imported("transformers.modeling_utils")
def _register(_module: object) -> None:
    """Register packed checkpoints with Transformers. Deferred until Transformers is imported, which takes seconds."""
    from matquant.transformers import register

    register()
