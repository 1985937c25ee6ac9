"""Searches of the shipped model through the Python interface, and their KL on held-out text.

Used by ``compare.py`` and ``bench_reload.py``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from matquant import cli
from matquant.config import Config, from_hydra
from matquant.data import texts
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.loading import load_model
from matquant.paths import resource_root
from matquant.search.config import SearchConfig
from matquant.search.context import SearchContext
from matquant.search.evaluator import EvaluatorConfig, open_evaluator
from matquant.search.fitness.kl_divergence import KlDivergence
from matquant.search.layer_forwards import DenseLayerForwards
from matquant.search.stage import make_problems, search
from matquant.stages.job import JobInfo, compute
from matquant.store import Artifact, Draft, Store
from matquant.store.artifact import read_artifact

_CACHE_BYTES = 4 * 10**9  # of dense weights, in the evaluation


class WatchedDraft:
    """Draft of a search that reports the name of each file after it is written."""

    def __init__(self, draft: Draft, on_write: Callable[[str], None]) -> None:
        self.has, self.read_json = draft.has, draft.read_json
        self.draft, self.on_write = draft, on_write

    def write_json(self, name: str, value: Any) -> None:
        self.draft.write_json(name, value)
        self.on_write(name)


class WatchedStore(Store):
    """Store with watched drafts."""

    def __init__(self, path: Path, on_write: Callable[[str], None]) -> None:
        super().__init__(path)
        self.on_write = on_write

    def open_or_build(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Any], dict[str, Any]]) -> Artifact:
        return super().open_or_build(kind, inputs, lambda draft: build(WatchedDraft(draft, self.on_write)))


def compose_config(*overrides: str) -> Config:
    """Typed config of a job with these overrides."""
    cli.register()
    with initialize_config_dir(str(resource_root() / "conf"), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def open_parent(config: Config) -> tuple[BlockModel, Parent, Any]:
    """Shipped model, its parent, and the loaded checkpoint. Quantize the model if the store has no parent."""
    info = JobInfo(folder=Path(), command="", name="", group=None, resolved={})
    results = compute(dataclasses.replace(config, stages=("quantize",)), info)
    assert results is not None
    assert results.parent.path is not None
    loaded = load_model(config.model)
    return BlockModel(loaded.model), Parent(read_artifact(Path(results.parent.path))), loaded


class Bench:
    """Model, parent and texts of all searches of a process.

    Attributes:
        weights: nested weights by layer name.
        evaluation: int64 [sequences, length], held-out text.
    """

    def __init__(self) -> None:
        config = compose_config("tracking=none")
        self.store = Path(config.store.path)
        self.blocks, self.parent, self.loaded = open_parent(config)
        self.weights = {n: w for i in range(len(self.parent.blocks)) for n, w in self.parent.block(i).items()}
        self.text = config.calibration
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(self.loaded.dtype, self.device)
        text = dataclasses.replace(config.eval.datasets["stdlib"], sequences=16)
        self.evaluation = texts.windows(text, "evaluation", self.loaded.tokenizer)

    def find(self, overrides: Sequence[str], on_write: Callable[[str], None]) -> dict[str, Any]:
        """Run one search, or resume it.

        Args:
            on_write: called with the name of each finished step; its exceptions end the search.

        Returns:
            ``candidate`` (bit-width of each unit), ``average_bits``, cost, and the speed since the last start.
        """
        config = compose_config(*overrides).search
        text = dataclasses.replace(
            self.text, sequences=config.sequences, sequence_length=config.sequence_length, seed=1 + config.seed
        )
        context = self._context(texts.windows(text, "calibration", self.loaded.tokenizer))
        result = search(config, context, WatchedStore(self.store, on_write), lambda _: None)
        allocation, record = result.allocations[0], result.record
        return {
            "candidate": [allocation.bits[unit.layers[0]] for unit in make_problems(config, context)[0].units],
            "average_bits": allocation.average_bits,
            **{key: record.get(key) for key in ("evaluations", "tokens", "seconds", "evaluations_per_second")},
        }

    def measure(self, candidates: Sequence[Sequence[int]]) -> list[float]:
        """KL of each candidate on the held-out text, in nats per token."""
        units = make_problems(SearchConfig(average_bits=8.0), self._context(self.evaluation))[0].units
        layer_forwards = DenseLayerForwards(self.weights, self.device, self.dtype, _CACHE_BYTES)
        config = EvaluatorConfig(fitness=KlDivergence(), batch_size=8, device=self.device)
        with open_evaluator(self.blocks, units, layer_forwards, self.evaluation, config) as evaluator:
            return evaluator.losses([tuple(candidate) for candidate in candidates], evaluator.all_tokens())

    def _context(self, sequences: torch.Tensor) -> SearchContext:
        return SearchContext(
            blocks=self.blocks, parent=self.parent, sequences=sequences, device=self.device, dtype=self.dtype
        )


@functools.cache
def bench() -> Bench:
    """Bench of this process."""
    return Bench()
