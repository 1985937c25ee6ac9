"""Checkpoint formats by the value of ``pack.name``; ``none``, which is not in the registry, means no packing.

To add a format: one file with a subclass of ``CheckpointFormat`` (``IntegerFormat`` for one slice in integer codes), one line
in ``FORMATS``, one preset in ``conf/pack``.
"""

from matquant.pack.formats.base import CheckpointFormat, PackRequest, PackResult
from matquant.pack.formats.compressed_tensors import CompressedTensorsFormat
from matquant.pack.formats.gguf import GgufFormat
from matquant.pack.formats.gptq import GptqFormat
from matquant.pack.formats.matgptq_v1 import MatGptqV1Format
from matquant.pack.formats.nested import NestedFormat

FORMATS: dict[str, CheckpointFormat] = {
    one.name: one for one in (NestedFormat(), MatGptqV1Format(), GptqFormat(), CompressedTensorsFormat(), GgufFormat())
}

__all__ = ["FORMATS", "CheckpointFormat", "PackRequest", "PackResult"]
