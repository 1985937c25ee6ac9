"""Subsets of the search's text: some of its sequences, the last one cut to the wanted number of tokens."""

import dataclasses
import random
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenSample:
    """Some sequences of the text.

    Attributes:
        rows: indices of the sequences, ascending.
        length: tokens of a whole sequence.
        last_length: tokens of the last sequence that belong to the sample.
    """

    rows: tuple[int, ...]
    length: int
    last_length: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return (len(self.rows) - 1) * self.length + self.last_length

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], int]]:
        """Yield the rows of each batch and the length of its sequences; a cut sequence has its own batch."""
        whole = list(self.rows if self.last_length == self.length else self.rows[:-1])
        for start in range(0, len(whole), batch_size):
            yield whole[start : start + batch_size], self.length
        if len(whole) < len(self.rows):
            yield [self.rows[-1]], self.last_length


def all_tokens(sequences: int, length: int) -> TokenSample:
    """Sample of the whole text."""
    return TokenSample(rows=tuple(range(sequences)), length=length, last_length=length)


def draw_tokens(sequences: int, length: int, tokens: int, rng: random.Random) -> TokenSample:
    """Draw sequences without replacement until they hold ``tokens`` tokens, or all sequences if the text is shorter.

    The last sequence is cut, to at least 2 tokens, so that one token is predicted.
    """
    count = min(-(-tokens // length), sequences)
    last_length = min(tokens - (count - 1) * length, length)
    rows = tuple(sorted(rng.sample(range(sequences), count)))
    return TokenSample(rows=rows, length=length, last_length=max(last_length, 2))
