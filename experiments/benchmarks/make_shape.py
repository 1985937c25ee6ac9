"""Write a packed folder of the shape of Llama 3.1 8B without weights, for ``--load-format dummy``.

    python experiments/benchmarks/make_shape.py FOLDER                        # 128256 tokens, no tokenizer
    python experiments/benchmarks/make_shape.py FOLDER --tokenizer SOURCE     # the tokenizer, and vocabulary, of a model
    python experiments/benchmarks/make_shape.py FOLDER --dense                # of the full-precision model

Speed does not depend on the values of weights. vLLM makes the same dummy values at every start.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from bench_e2e import config_of, nested_spec


def write_shape(folder: Path, nested: bool, tokenizer: str | None = None) -> Path:
    """Write the config, and the tokenizer if one is named, and return the folder."""
    config = config_of("llama-8b")
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float16
    if tokenizer is not None:
        given = AutoTokenizer.from_pretrained(tokenizer)
        config.vocab_size, config.bos_token_id, config.eos_token_id = len(given), given.bos_token_id, given.eos_token_id
        given.save_pretrained(folder)
    if nested:
        config.quantization_config = nested_spec(config, torch.float16).to_json()
    config.save_pretrained(folder)
    return folder


def main() -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="folder of a model")
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args()
    print(write_shape(given.folder, not given.dense, given.tokenizer))


if __name__ == "__main__":
    main()
