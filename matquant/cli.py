"""Command line: composes the config with Hydra, and turns errors into sentences and exit statuses.

``python run.py`` and the console script ``matquant`` are the same. Commands are names for overrides, see ``_COMMANDS``;
``matquant store ls`` is ``matquant store=ls``, ``matquant serve FOLDER OPTION...`` starts vLLM's server, and
``matquant completion SHELL`` prints a script that completes all of these.
"""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from matquant import completion
from matquant.config import RENAMED, Config, from_hydra, schemas
from matquant.errors import UserError
from matquant.optional_packages import check_installed
from matquant.paths import resource_root
from matquant.typed_config import renamed_sentence

# Overrides that a command stands for; the user's own come after them.
_COMMANDS = {
    "quantize": ["stages=[quantize]"],
    "evaluate": ["stages=[quantize,evaluate]"],
    "pack": ["stages=[quantize]", "pack=nested"],
    "generate": ["stages=[quantize,generate]"],
}

_OTHER_COMMANDS = ["serve", "store", "completion"]

# Options of vLLM's server that ``matquant serve`` adds: the endpoint that changes the bit-width while serving.
_SERVER_OPTIONS = {
    "--worker-extension-cls": "matquant.vllm.worker.WidthExtension",
    "--middleware": "matquant.vllm.endpoint.WidthEndpoint",
}

# OpenMP threads that have nothing to do spin for milliseconds by default. On cores that other processes use, a spinning thread
# takes the time of the thread it waits for, at every parallel region. These values make it sleep after tens of microseconds.
_WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}

# Keeps Hydra from making a folder and a log.
_SILENT = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]


def register() -> None:
    """Register the resolver ``${matquant.root:}`` and the group ``schema`` with Hydra."""
    OmegaConf.register_new_resolver("matquant.root", lambda: str(resource_root()), replace=True)
    store = ConfigStore.instance()
    for name, node in schemas().items():
        store.store(group="schema", name=name, node=node, provider="matquant")


register()


class JobError(Exception):
    """OSError of a job that no component turned into a sentence; what Hydra raises outside of a job is about its folders."""


@hydra.main(version_base="1.3", config_path=str(resource_root() / "conf"), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """Run one job of a composed config; return the figure that a sweeper minimises."""
    register()  # a launcher's worker process imports this module, but may resolve its config again
    config = from_hydra(cfg)
    if config.store.action is not None:
        from matquant import store_commands

        store_commands.run(config.store)
        return None
    try:
        return _run_job(config, cfg)
    except OSError as error:
        raise JobError(f"{type(error).__name__}: {error}") from error


def _run_job(config: Config, cfg: DictConfig) -> float | None:
    # Imported late, so that --help, --cfg and a wrong type answer before torch is loaded.
    from matquant.config_check import check_config
    from matquant.stages.job import JobInfo, run_job

    check_config(config)
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    if sweeping and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "torchrun runs one job in several processes; give a sweep (-m) to python run.py, without torchrun."
        )
    folder = Path(hydra_config.runtime.output_dir)
    overrides = [str(o) for o in hydra_config.overrides.task]
    info = JobInfo(
        folder=folder,
        command=shlex.join(["python", "run.py", *overrides]),
        name=folder.name,
        group=str(Path(hydra_config.sweep.dir).name) if sweeping else None,
        resolved=OmegaConf.to_container(cfg, resolve=True),
    )
    return run_job(config, info)


def _interrupt(_signal: int, _frame: object) -> None:
    """Handle the termination notice of a batch system like Ctrl-C."""
    raise KeyboardInterrupt


def _translate(arguments: list[str]) -> list[str]:
    """Translate a command at the front to overrides; refuse settings by their old names.

    Raises:
        UserError: names the new setting, or the commands.
    """
    command, rest = (arguments[0] if arguments else ""), arguments[1:]
    if command == "store":
        arguments = [f"store={rest[0] if rest else 'ls'}", *rest[1:]]
    elif command in _COMMANDS:
        own = {argument.lstrip("+").partition("=")[0] for argument in rest}
        arguments = [o for o in _COMMANDS[command] if o.partition("=")[0] not in own] + rest
    elif command.isidentifier():
        raise UserError(
            f"{command!r} is no command; there are {', '.join([*_COMMANDS, *_OTHER_COMMANDS])}. A setting is name=value."
        )
    for argument in arguments:
        name = argument.lstrip("+~").partition("=")[0]
        if name in RENAMED:
            raise UserError(renamed_sentence(name, RENAMED))
    return arguments


def server_command(arguments: list[str]) -> list[str]:
    """Command of vLLM's server for a folder and options of vLLM, with the endpoint that changes the bit-width.

    Raises:
        UserError: there is no folder at the front.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            "matquant serve needs a packed folder, and then options of vLLM: matquant serve FOLDER --port 8000."
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments]
    given = {argument.partition("=")[0] for argument in arguments}
    return command + [part for option in _SERVER_OPTIONS.items() if option[0] not in given for part in option]


def _serve(arguments: list[str]) -> NoReturn:
    """Replace this process by vLLM's server, which loads the plugin by itself."""
    check_installed("vllm", "matquant serve")
    os.execvp(sys.executable, server_command(arguments))


def _limit_spinning() -> None:
    """Set OpenMP's wait policy, unless the user did. It is read when torch and numba are loaded."""
    if os.environ.keys().isdisjoint({*_WAIT_POLICY, "KMP_BLOCKTIME"}):
        os.environ.update(_WAIT_POLICY)


def _folder_error(error: Exception) -> OSError | None:
    """OSError of a folder that Hydra could not make or write; None for any other error."""
    if isinstance(error, ValueError) and str(error).startswith("Unable to configure handler"):  # of the log file
        return error.__cause__ if isinstance(error.__cause__, OSError) else None
    return error if isinstance(error, OSError) else None


def main() -> None:
    """Entry point: exit status 0, or 2 with one sentence for an error that the user can fix."""
    # Hydra would print a shortened traceback of its own and exit; this way errors are raised here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    _limit_spinning()
    signal.signal(signal.SIGTERM, _interrupt)
    rank = int(os.environ.get("RANK", "0"))
    try:
        if sys.argv[1:2] == ["serve"]:
            _serve(sys.argv[2:])
        if sys.argv[1:2] == ["completion"]:
            words = completion.Completion([*_COMMANDS, *_OTHER_COMMANDS], _translate, run)
            print(completion.command(sys.argv[2:], words), end="")
            return
        sys.argv[1:] = _translate(sys.argv[1:])
        if rank > 0:  # the main process alone has the output folder and the terminal
            sys.argv += _SILENT
        run()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"error{f' in process {rank}' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, ValueError) as error:
        if (cause := _folder_error(error)) is None:
            raise
        print(
            f"error: the output folder cannot be written ({cause.filename}: {cause.strerror}). Check the permissions, or set "
            "hydra.run.dir (of a sweep hydra.sweep.dir) to another folder.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted: finished blocks are kept, and the same command continues from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
