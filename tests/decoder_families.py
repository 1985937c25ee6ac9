"""Outcome of one decoder family of Transformers: supported with right results, or refused before work.

A random small model is saved, quantized, evaluated, packed, loaded by ``from_pretrained``, and compared with a stock model
that has the dequantized weights.
"""

import dataclasses
import heapq
import shutil
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from architectures import random_model, save
from hydra import compose, initialize_config_dir
from shared import ROOT, SMALL
from small_configs import small_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.cli import register
from matquant.config import Config, from_hydra
from matquant.data import texts
from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.inference import nested_layers
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.loading import open_model
from matquant.report.results import JobResults
from matquant.stages.job import JobInfo, compute
from matquant.store import Store
from matquant.store.artifact import read_artifact

BITS = (2, 8)
_OVERRIDES = (
    *SMALL,
    "method.group_size=32",
    f"bits={list(BITS)}",
    "stages=[quantize,evaluate,pack]",
    "pack=nested",
    "runtime.device=cpu",
    "runtime.progress=false",
    "runtime.threads=1",
    "calibration.dataset=local",
    "eval.datasets.stdlib.dataset=local",
)
SUPPORTED, REFUSED, NOT_TRIED = "supported", "refused", "not tried"
NO_GENERATION = ("xlstm",)  # its stock model fails with a cache
_PROBE = torch.arange(8)[None]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one family.

    Attributes:
        family: model type of its config.
        model: class of the model; empty if there is none.
        kind: one of SUPPORTED, REFUSED, NOT_TRIED.
        layers: number of quantized layers; 0 unless supported.
        sentence: of the refusal, or the error of Transformers.
        dense: matrices in full precision beside embeddings and head, by name, with the reason.
    """

    family: str
    model: str
    kind: str
    layers: int = 0
    sentence: str = ""
    dense: Mapping[str, str] = dataclasses.field(default_factory=dict)


@cache
def _config(folder: Path) -> Config:
    """Composed config of all jobs, without model. Texts are two modules of the standard library, copied to ``folder``."""
    overrides = [*_OVERRIDES, f"store.path={folder / 'store'}"]
    for name, module in (("calibration", textwrap), ("eval.datasets.stdlib", heapq)):
        file = shutil.copy(str(module.__file__), folder / f"{name}.txt")
        overrides.append(f"{name}.path={file}")
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(compose("config", overrides=overrides))


def outcome_of(family: str, folder: Path, shared: Path) -> Outcome:
    """Run one family from end to end.

    Args:
        folder: empty or missing; checkpoint and packed model are written there.
        shared: folder of the texts and the store; may be that of other families.

    Raises:
        AssertionError: the family is neither supported with right results nor refused before work.
    """
    try:
        model = random_model(small_config(family))
        model(input_ids=_PROBE, use_cache=False)
    except Exception as error:  # code of any architecture raises anything
        return Outcome(family, "", NOT_TRIED, sentence=_first_line(error))
    name = type(model).__name__
    config = dataclasses.replace(_config(shared), model=ModelConfig(path=str(save(model, folder / "model"))))
    store = Path(config.store.path)
    parents = set((store / "parent").glob("*"))
    job = folder / "job"
    job.mkdir(parents=True)
    refusal, results = None, None
    try:
        results = compute(config, JobInfo(folder=job, command="", name=family, group=None, resolved={}))
    except UserError as error:
        refusal = str(error).replace(str(folder / "model"), "FOLDER")
    if refusal is not None:
        assert set((store / "parent").glob("*")) == parents, f"{family} was refused after work: {refusal}"
        return Outcome(family, name, REFUSED, sentence=refusal)
    assert results is not None
    _check_results(results)
    _check_packed(config, job, results)
    return Outcome(family, name, SUPPORTED, layers=len(results.layers), dense=_dense(results))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'without a message'}"


def _dense(results: JobResults) -> dict[str, str]:
    rows = {row["name"]: row["reason"] for row in results.unquantized}
    return {name: why for name, why in rows.items() if not why.startswith(("embeddings", "the head", "norm"))}


def _check_results(results: JobResults) -> None:
    low, high = (entry.kl["stdlib"] for entry in results.slices)
    assert low is not None
    assert high is not None
    assert 0 < high < low
    assert high < 0.01
    assert not any("not finite" in warning or "KL" in warning for warning in results.warnings), results.warnings


@torch.no_grad()
def _check_packed(config: Config, job: Path, results: JobResults) -> None:
    """Compare the packed model with a stock model that has the dequantized weights, and the KL with its logits."""
    original, packed = Path(str(config.model.path)), job / "packed"
    full, dense = _stock(original), _stock(original)
    nested = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert len(nested_layers(nested)) == len(results.layers)
    parent = Parent(read_artifact(Path(str(results.parent.path))))
    loaded = open_model(config.model)
    windows = texts.windows(
        config.eval.datasets["stdlib"], "evaluation", loaded.tokenizer, Store(Path(str(config.store.path)))
    )
    views = BlockModel(loaded.model).source_views
    expected = full(input_ids=windows, use_cache=False).logits
    for bits, entry in zip(BITS, results.slices, strict=True):
        _set_weights(dense, parent, views, bits)
        nested.set_bits(bits)
        wanted, found = (model(input_ids=windows, use_cache=False).logits for model in (dense, nested))
        scale = wanted[torch.isfinite(wanted)].abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)
        kl = _divergence(expected, found)
        assert abs(kl - entry.kl["stdlib"]) <= 1e-3 * kl + 1e-7, (bits, kl, entry.kl)
        if dense.config.model_type not in NO_GENERATION:
            assert _generated(nested, windows) == _generated(dense, windows)


def _stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _set_weights(model: Any, parent: Parent, views: Mapping[str, Any], bits: int) -> None:
    """Set the weights of a stock model to those of one slice, in the places where the architecture stores them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            view = views.get(f"{name}.weight")
            place = parameters[f"{name}.weight"] if view is None else view.view(parameters[view.name])
            place.copy_(weight.dequantize(bits))


def _divergence(full: Tensor, found: Tensor) -> float:
    """Mean KL of the next-token distributions over all tokens but the last of each window."""
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (full, found))
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return terms.sum(-1).mean().item()


def _generated(model: Any, windows: Tensor) -> list[list[int]]:
    """Greedy tokens after a prompt, with the cache of the architecture."""
    prompt = windows[:1, :8]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    return ids.tolist()
