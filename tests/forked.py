"""Jobs in processes of their own that start with all packages imported, which takes longer than a small job.

They are forked from a server process that has imported the packages and done nothing else. ``run_py`` of ``conftest.py`` starts
a new interpreter instead. Functions that ``atexit`` registers do not run in them.
"""

import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# With the modules that a job imports late.
_CONTEXT.set_forkserver_preload(
    [
        "matquant.cli",
        "matquant.config_check",
        "matquant.stages.job",
        "matquant.quantize.gptq.quantizer",
        "matquant.quantize.rtn.quantizer",
        "matquant.report.html",
        "matplotlib.figure",
        "matplotlib.backends.backend_svg",
        "transformers.models.llama.modeling_llama",
    ]
)
_numbers = itertools.count()


class ForkedJob:
    """Job with the interface of ``subprocess.Popen`` as far as tests use it.

    Args:
        arguments: of ``run.py``.
        folder: working directory of the process; its output is written to files beneath.
        environment: variables that are set in the process.
    """

    def __init__(self, arguments: list[str], folder: Path, **environment: str) -> None:
        number = next(_numbers)
        self._output = [folder / f"{name}-{number}.txt" for name in ("stdout", "stderr")]
        for file in self._output:
            file.touch()
        self._process = _CONTEXT.Process(target=_run, args=(arguments, folder, self._output, environment))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return its standard output and standard error.

        Raises:
            TimeoutError: it took longer, and was killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(self._output[1].read_text())
        out, err = (file.read_text() for file in self._output)
        return out, err


def _run(arguments: list[str], folder: Path, output: list[Path], environment: dict[str, str]) -> None:
    """Run the command line in this process."""
    for descriptor, file in zip((1, 2), output, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit that it is ignored
    sys.argv = ["run.py", *arguments]
    from matquant import cli

    cli.main()
