"""Matryoshka post-training quantization of language models: one 8-bit parent, every slice a good model."""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.modeling_utils")
def _register(_module: object) -> None:
    """Make packed checkpoints known to Transformers, once that is imported by somebody: here it would take seconds."""
    from matquant.transformers import register

    register()
