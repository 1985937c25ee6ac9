"""Keys of cached KV blocks by bit-width, so that a prefix is only reused at the bit-widths that it was computed at.

vLLM finds a cached block by the hash of all tokens up to its end. Here the hash also covers the bit-widths that computed these
tokens. When the bit-width of a running request changes, the blocks that are complete keep their hashes. Works without vLLM.
"""

import hashlib
from collections.abc import Callable
from typing import Any


class WidthKeyedHasher:
    """Block hasher of one request, in place of vLLM's.

    Args:
        request: request of vLLM, before its first step.
        width: name of its bit-width.
    """

    def __init__(self, request: Any, width: str) -> None:
        self._hash: Callable[[Any], list[bytes]] = request._block_hasher
        self._plain: list[bytes] = list(request.block_hashes)  # vLLM's hashes, which do not cover bit-widths
        self._history: list[tuple[int, str]] = []  # (first block, key)
        request._block_hasher = self
        self.restart(request, width)

    def __call__(self, request: Any) -> list[bytes]:
        """Hashes of the blocks that have become full, as vLLM's hasher returns them."""
        start, public = len(self._plain), request.block_hashes
        request.block_hashes = self._plain
        try:
            self._plain = self._plain + self._hash(request)
        finally:
            request.block_hashes = public
        return [self._keyed(index) for index in range(start, len(self._plain))]

    def restart(self, request: Any, width: str) -> None:
        """All tokens will be computed at one bit-width, for the first time or again after a preemption."""
        if self._history != [(0, width)]:
            self._history = [(0, width)]
            request.block_hashes[:] = [self._keyed(index) for index in range(len(self._plain))]

    def change(self, request: Any, width: str, settled_tokens: int, computed_tokens: int, block_size: int) -> None:
        """The next tokens will be computed at another bit-width.

        Args:
            settled_tokens: number of tokens that are computed already and will not be computed again.
            computed_tokens: number of these and of tokens that may be computed again, such as drafts.
            block_size: tokens of the blocks that are hashed.
        """
        complete = settled_tokens // block_size
        if computed_tokens > complete * block_size:  # the next block is computed at both: only this request may use it
            self._history.append((complete, f"{width} {request.request_id} {len(self._history)}"))
        else:
            self._history.append((complete, width))
        kept = request.block_hashes[:complete]
        request.block_hashes[:] = kept + [self._keyed(index) for index in range(len(kept), len(self._plain))]

    def _keyed(self, index: int) -> bytes:
        history = [(start, key) for start, key in self._history if start <= index]
        return hashlib.sha256(self._plain[index] + repr(history).encode()).digest()
