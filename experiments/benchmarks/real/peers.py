"""Other packages on the models, the calibration windows and the measures of ``benchmark.py``.

    pip install auto-round llmcompressor     # in an environment of their own, with this project
    python experiments/benchmarks/real/peers.py outputs/real/smollm2-135m-instruct.gguf --peers auto_round llmcompressor
    python experiments/benchmarks/real/peers.py MODEL.gguf --peers auto_round --bits 2 3 --iterations 1000

Each bit-width is a model of its own, quantized by the package alone: AutoRound with its default settings (its recipe for 2
bits has zero points), and GPTQ of llm-compressor, symmetric. Their weights, as the package dequantizes them, are measured in
float32 like ours. Records join those of ``benchmark.py``: the method is the package with its version.
"""

import argparse
import copy
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import merge, open_reference, origin, records_against
from torch import Tensor
from torch.utils.data import DataLoader

from matquant.data.config import TextConfig
from matquant.data.texts import windows

CALIBRATION_SEQUENCES = 128


def auto_round(model: Any, tokenizer: Any, ids: Tensor, bits: int, given: argparse.Namespace) -> Any:
    """Model with weights rounded by AutoRound."""
    from auto_round import AutoRound

    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids.split(8)]
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=bits,
        group_size=given.group_size,
        sym=bits > 2,
        iters=given.iterations,
        dataset=batches,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map=given.device,
    )
    return rounder.quantize()[0]


def llmcompressor(model: Any, tokenizer: Any, ids: Tensor, bits: int, given: argparse.Namespace) -> Any:
    """Model with weights rounded by the GPTQ of llm-compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=given.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=DataLoader(rows, batch_size=8),  # type: ignore[arg-type]
        recipe=GPTQModifier(config_groups={"weights": scheme}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    return model


PEERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "auto_round": ("auto-round", auto_round),
    "llmcompressor": ("llmcompressor", llmcompressor),
}


def main() -> None:
    """Quantize with what the command line names, and record after every bit-width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound, for each block")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/real"))
    given = parser.parse_args()
    exact, tokenizer, store = open_reference(given.model, given.device)
    text = TextConfig(dataset="stdlib", sequences=CALIBRATION_SEQUENCES, sequence_length=512, seed=given.seed)
    ids = windows(text, "calibration", tokenizer, store)
    for peer in given.peers:
        package, quantize = PEERS[peer]
        for bits in given.bits:
            start = time.perf_counter()
            with torch.enable_grad():
                made = quantize(copy.deepcopy(exact), tokenizer, ids, bits, given).to(given.device).float().eval()
            row = {
                "model": given.model.stem,
                "method": f"{package} {importlib.metadata.version(package)}",
                "refine": "none",
                "seed": given.seed,
                "group_size": given.group_size,
                "bits": bits,
                "evaluation_dtype": "float32",
                "seconds": round(time.perf_counter() - start, 1),
                **origin(),
            }
            merge(given.out / f"{given.model.stem}.json", records_against(exact, made, tokenizer, store, row))


if __name__ == "__main__":
    main()
