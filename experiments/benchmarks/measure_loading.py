"""What loading a packed folder reads and keeps, for each max_bits, each in a process of its own.

    .venv/bin/python experiments/benchmarks/measure_loading.py FOLDER

"read" is what the process read from files while it loaded (Linux counts it in /proc/self/io; hashes read every byte once),
"resident" how much its memory grew.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

WIDTHS = (2, 3, 4, 8)


def status(name: str, file: str) -> int:
    """A number that Linux keeps for this process."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def load(folder: str, max_bits: int) -> None:
    """Load the folder, and print what that took as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    import matquant  # noqa: F401 - makes the format known
    from matquant.inference import nested_layers

    AutoModelForCausalLM.from_pretrained(folder, max_bits=2, dtype=torch.float16)  # imports what loading needs
    before = status("rchar", "io"), status("VmRSS", "status")
    model = AutoModelForCausalLM.from_pretrained(folder, max_bits=max_bits, dtype=torch.float16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()  # what is mapped is read now
    after = status("rchar", "io"), status("VmRSS", "status")
    planes = sum(layer.planes.nbytes for layer in nested_layers(model).values())
    print(json.dumps({"read": after[0] - before[0], "resident": 1024 * (after[1] - before[1]), "planes": planes}))


def main() -> None:
    folder = sys.argv[1]
    if len(sys.argv) > 2:
        load(folder, int(sys.argv[2]))
        return
    print(f"{'max_bits':>8} {'planes MB':>10} {'read MB':>10} {'resident MB':>12}")
    for bits in WIDTHS:
        run = subprocess.run([sys.executable, __file__, folder, str(bits)], capture_output=True, text=True, check=True)
        found = json.loads(run.stdout)
        print(f"{bits:>8} {found['planes'] / 1e6:>10.1f} {found['read'] / 1e6:>10.1f} {found['resident'] / 1e6:>12.1f}")


if __name__ == "__main__":
    main()
