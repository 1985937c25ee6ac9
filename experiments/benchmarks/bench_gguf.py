"""GGUF files of slices in llama.cpp: size, loading time, speed, and how close its logits are to those of Transformers.

    make test-gguf                                                        # builds the environment of the engine
    python experiments/benchmarks/bench_gguf.py                           # the shipped model
    python experiments/benchmarks/bench_gguf.py --model outputs/real/smollm2-135m-instruct.gguf --name smollm2

``run.py`` packs every file from one parent in the store (8 calibration windows of 128 tokens, so that a CPU needs minutes; the
figures are about the engine and not about the method). F16 and Q8_0 are files of the unquantized model: the first two that
llama.cpp's own quantizer makes of its weights in float32. Windows are held-out source of the standard library.

For each file, NAME.json has:

    bytes, types             size, and number of tensors of each type
    load, prompt, decode     seconds; tokens a second
    kl_engine                mean KL of llama.cpp to Transformers in float32 with the weights of the same file
    logit_difference         mean absolute difference of the same logits
    greedy_equal, greedy     generated tokens that are equal to those of Transformers, of how many
    kl_full                  mean KL of llama.cpp to the unquantized model in Transformers in float32
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from matquant.data.config import TextConfig
from matquant.data.texts import windows
from matquant.formats.packed import TensorSpec
from matquant.models.config import ModelConfig
from matquant.models.gguf import SUFFIX, convert_gguf
from matquant.pack.gguf.architectures import architecture_of
from matquant.pack.gguf.tensor_plan import plan_tensors
from matquant.report.provenance import provenance
from matquant.store import Store

TINY = Path("experiments/models/tiny")
ENGINE = Path(__file__).with_name("gguf_engine.py")
CALIBRATION = ("calibration.sequences=8", "calibration.sequence_length=128")
WIDTHS = {"q_proj": 3, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
FILES: dict[str, tuple[str, ...]] = {
    "4": ("pack.bits=4",),
    "3": ("pack.bits=3",),
    "2": ("pack.bits=2",),
    "allocation": ("pack.bits={allocation}",),
    "8 nearest": ("pack.bits=8", "pack.rounding=nearest"),
    "3 nearest": ("pack.bits=3", "pack.rounding=nearest"),
    "2 nearest": ("pack.bits=2", "pack.rounding=nearest"),
}
ORIGINALS = ("F16", "Q8_0")


def pack(model: Path, overrides: Sequence[str], target: Path) -> Path:
    """Pack one file with ``run.py``; the parent is quantized once."""
    stages = ("stages=[quantize,pack]", "pack=gguf", f"pack.path={target}", "pack.overwrite=true", "tracking=none")
    command = [sys.executable, "run.py", f"model.path={model}", *CALIBRATION, *stages, *overrides]
    subprocess.run([*command, f"hydra.run.dir={target}-run", "runtime.device=cpu"], check=True)
    (file,) = target.glob(f"*{SUFFIX}")
    return file


def write_allocation(folder: Path, target: Path) -> Path:
    """Allocation file with a bit-width for each kind of projection."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "." in name]
    target.write_text("".join(f"{name}: {WIDTHS[name.rpartition('.')[2]]}\n" for name in names))
    return target


def write_full_precision(folder: Path, like: Path, target: Path) -> Path:
    """Write a model's own weights in F32, with the metadata of another file of the same model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: value for name, value in model.state_dict().items() if name not in set(model.all_tied_weights_keys)}
    architecture = architecture_of(model.config)
    reader, writer = gguf.GGUFReader(like), gguf.GGUFWriter(target, architecture.name)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "general.file_type", "matquant.")):
            elements = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], elements)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in state.items()}
    for tensor in plan_tensors(specs, model.config, architecture):
        values = torch.stack([piece.of(state[piece.source]) for piece in tensor.pieces]).view(tensor.shape)
        writer.add_tensor(tensor.name, (values + tensor.shift).contiguous().numpy())
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_"):
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def run_engine(python: Path, folder: Path, job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Results of ``gguf_engine.py`` for each file of a job; files are written below ``folder``."""
    whole = {"quantize": [], "windows": [], "prompts": [], "tokens": 0, "texts": [], "threads": 2, "out": str(folder)}
    whole |= job | {"files": [str(file) for file in job["files"]]}
    (folder / "job.json").write_text(json.dumps(whole))
    done = subprocess.run([python, ENGINE, folder / "job.json"], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"The engine failed: {done.stderr[-3000:]}")
    return [np.load(folder / f"{number}.npz") for number in range(len(whole["files"]))]


@torch.inference_mode()
def reference(model: Any, ids: Tensor, prompts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Logits [windows, length, vocabulary], and greedy tokens [prompts, tokens], of a model of Transformers in float32."""
    model = model.eval()
    logits = torch.cat([model(batch, use_cache=False).logits for batch in ids.split(1)])
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    rows = [model.generate(prompt[None], **options)[0, len(prompt) :] for prompt in prompts]
    return logits, torch.stack(rows) if rows else torch.empty(0, tokens)


def divergence(exact: Tensor, found: Tensor) -> float:
    """Mean KL(exact || found) of next-token distributions, in nats."""
    log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def measure(file: Path, found: Mapping[str, Any], full: Tensor, ids: Tensor, prompts: Tensor) -> dict[str, Any]:
    """Record of one file."""
    tokens = found["greedy"].shape[1]
    same = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    exact, greedy = reference(same, ids, prompts, tokens)
    logits, seconds = torch.from_numpy(found["logits"]), found["seconds"].tolist()
    types = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors)
    return {
        "bytes": file.stat().st_size,
        "types": dict(sorted(types.items())),
        "load": round(seconds[0], 3),
        "prompt": round(1 / seconds[1], 1),
        "decode": round(1 / seconds[2], 1),
        "kl_engine": divergence(exact, logits),
        "logit_difference": (exact - logits).abs().mean().item(),
        "greedy_equal": int((greedy.numpy() == found["greedy"]).sum()),
        "greedy": greedy.numel(),
        "kl_full": divergence(full, logits),
    }


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="folder or GGUF file")
    parser.add_argument("--name", default="tiny", help="of the record")
    parser.add_argument("--engine", type=Path, default=Path(".venv-gguf/bin/python"))
    parser.add_argument("--windows", type=int, default=4, help="of 128 tokens")
    parser.add_argument("--tokens", type=int, default=64, help="to generate after each of 2 prompts")
    parser.add_argument("--files", type=Path, default=Path("outputs/gguf"), help="folder of the GGUF files")
    parser.add_argument("--reuse", action="store_true", help="take packed files that are there already")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/gguf"))
    asked = parser.parse_args()
    torch.set_num_threads(2)
    target, store = asked.files / asked.name, Store(Path("outputs/store"))
    target.mkdir(parents=True, exist_ok=True)
    folder = asked.model
    if folder.suffix == SUFFIX:
        folder = Path(str(convert_gguf(ModelConfig(path=str(asked.model)), store)[0].path))
    allocation = write_allocation(folder, target / "allocation.txt")
    files = {}
    for name, own in FILES.items():
        place = target / name.replace(" ", "-")
        there = list(place.glob(f"*{SUFFIX}")) if asked.reuse else []
        files[name] = there[0] if there else pack(asked.model, [o.format(allocation=allocation) for o in own], place)
    source = write_full_precision(folder, files["4"], target / "F32.gguf")
    originals = {kind: target / f"{kind}.gguf" for kind in ORIGINALS}
    files |= originals
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TextConfig(dataset="stdlib", sequences=asked.windows + 2, sequence_length=128)
    ids = windows(text, "evaluation", tokenizer, store)
    ids, prompts = ids[: asked.windows], ids[asked.windows :, :32]
    job = {
        "quantize": [[str(source), str(file), kind] for kind, file in originals.items()],
        "files": list(files.values()),
        "windows": ids.tolist(),
        "prompts": prompts.tolist(),
        "tokens": asked.tokens,
    }
    found = run_engine(asked.engine.absolute(), target, job)
    full, _ = reference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids, prompts[:0], 1)
    records = {}
    for (name, file), results in zip(files.items(), found, strict=True):
        records[name] = measure(file, results, full, ids, prompts)
        print(name, records[name], flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "model": str(asked.model), "files": records}
    (asked.out / f"{asked.name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
