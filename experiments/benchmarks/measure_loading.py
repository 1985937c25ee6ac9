"""Measure the file reads and the memory of loading a packed folder at each max_bits, each in a process of its own.

    .venv/bin/python experiments/benchmarks/measure_loading.py FOLDER --out loading.json

"read" is the number of bytes that the process read from files while it loaded the model (Linux counts them in /proc/self/io;
the check of hashes reads every byte once). "resident" is the growth of its resident memory.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

MAX_BITS = (2, 3, 4, 8)


def process_counter(name: str, file: str) -> int:
    """Counter of this process in ``/proc/self/FILE``."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def load(folder: str, max_bits: int) -> None:
    """Load the folder and print the bytes read, the growth of memory and the bytes of the planes as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    import matquant  # noqa: F401 - registers the format
    from matquant.inference import nested_layers

    AutoModelForCausalLM.from_pretrained(
        folder, max_bits=2, dtype=torch.float16
    )  # imports everything that loading needs
    before = process_counter("rchar", "io"), process_counter("VmRSS", "status")
    model = AutoModelForCausalLM.from_pretrained(folder, max_bits=max_bits, dtype=torch.float16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()  # reads memory-mapped tensors
    after = process_counter("rchar", "io"), process_counter("VmRSS", "status")
    planes = sum(layer.planes.nbytes for layer in nested_layers(model).values())
    print(json.dumps({"read": after[0] - before[0], "resident": 1024 * (after[1] - before[1]), "planes": planes}))


def main() -> None:
    """Measure each max_bits in a process of its own, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--load", type=int, metavar="MAX_BITS", help="load once in this process")
    arguments = parser.parse_args()
    if arguments.load is not None:
        load(arguments.folder, arguments.load)
        return
    print(f"{'max_bits':>8} {'planes MB':>10} {'read MB':>10} {'resident MB':>12}")
    rows = []
    for bits in MAX_BITS:
        command = [sys.executable, __file__, arguments.folder, "--load", str(bits)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{bits:>8} {row['planes'] / 1e6:>10.1f} {row['read'] / 1e6:>10.1f} {row['resident'] / 1e6:>12.1f}")
        rows.append({"max_bits": bits, **row})
    if arguments.out:
        from matquant.report.provenance import provenance

        arguments.out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
