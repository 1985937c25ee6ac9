"""Text sources by the value of ``dataset``; ``mix``, which is not in the registry, combines several of them.

To add a source: one file with a subclass of ``TextSource``, one line in ``SOURCES``, one preset in ``conf/calibration`` or
``conf/eval``.
"""

from matquant.data.sources.base import TextSource
from matquant.data.sources.c4 import C4Source
from matquant.data.sources.fineweb_edu import FineWebEduSource
from matquant.data.sources.local import LocalSource
from matquant.data.sources.stdlib import StdlibSource
from matquant.data.sources.wikitext2 import WikiText2Source

SOURCES: dict[str, TextSource] = {
    source.name: source for source in (StdlibSource(), WikiText2Source(), C4Source(), FineWebEduSource(), LocalSource())
}

__all__ = ["SOURCES", "TextSource"]
