"""Commands for the next steps of a user, with the paths of a job's outputs."""

import shlex

from matquant.report.results import JobResults


def next_commands(results: JobResults) -> list[tuple[str, str]]:
    """Purpose and command line of up to three next steps; none for a job that failed or made several models."""
    if results.failure is not None or results.parent.models or not results.command:
        return []
    if results.pack is not None:
        folder = shlex.quote(str(results.pack["folder"]))
        return [("serve it with vLLM", f"matquant serve {folder}")] if results.pack["format"] == "nested" else []
    found = [("a folder for Transformers and vLLM", f"{results.command} pack=nested")]
    if results.search is None:
        found.append(("a bit-width for each layer", f"{results.command} search.average_bits=3"))
    if results.refine is None:
        found.append(("better 2 to 4 bits by training", f"{results.command} refine=scales"))
    return found
