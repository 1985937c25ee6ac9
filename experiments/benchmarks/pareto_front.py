"""Allocations under several budgets, against uniform slices of the same parent and one GPTQ model per bit-width.

    python experiments/benchmarks/pareto_front.py
    python experiments/benchmarks/pareto_front.py model=llama3_8b eval=wikitext2

Runs two jobs and writes one summary of both to outputs/pareto. Overrides apply to both jobs, those of ``search`` to the
first one only. A finished job is not run again. A failed job is reported and does not stop the other.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from matquant.report.summary import HTML_NAME, summarize

ROOT = Path(__file__).resolve().parents[2]
JOBS = {
    "parent": ("method=matgptq", "search=pareto", "bits=[2,3,4,5,6]"),
    "per_bit_models": ("method=gptq", "bits=[2,3,4,5,6]"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "pareto")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    failed = []
    for name, overrides in JOBS.items():
        if not (folder / name / "results.json").exists():
            given = [o for o in arguments.overrides if name == "parent" or not o.startswith("search")]
            command = [sys.executable, str(ROOT / "run.py"), *overrides, *given, f"hydra.run.dir={folder / name}"]
            failed += [name] if subprocess.run(command, check=False).returncode else []
    summarize(folder)
    if failed:
        print(f"failed: {', '.join(failed)}; the summary has the other job", file=sys.stderr)
    print(f"summary: {folder / HTML_NAME}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
