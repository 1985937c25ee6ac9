"""Completion of command lines: words for the cursor, and real shells that get a Tab."""

import os
import pty
import select
import shutil
import sys
import time

import pytest
from shared import ROOT

from matquant import cli

# Options that keep a shell from reading the user's settings.
SHELLS = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}
LOAD = {"bash": "source <(matquant completion bash)", "zsh": "source <(matquant completion zsh)"}
LOAD["fish"] = "matquant completion fish | source"


@pytest.fixture
def complete(monkeypatch, capsys):
    """Function that calls ``matquant completion`` in this process; returns exit status, standard output and standard error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COMP_LINE", "")  # restored afterwards

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "completion", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("matquant quan", {"quantize"}),
        ("matquant method=rt", {"method=rtn"}),
        ("/usr/bin/matquant pack method=gpt", {"method=gptq"}),
        ("python run.py method=rt", {"method=rtn"}),
        (".venv/bin/python3.12 ./run.py -m method=rt", {"method=rtn"}),
        ("matquant method=matgptq method.cd_pas", {"method.cd_passes="}),
        ("matquant evaluate method=rtn method.cd_pas", set()),
        ("matquant store v", {"verify"}),
        ("matquant completion ", {"bash", "zsh", "fish"}),
        ("matquant serve FOLDER --po", set()),
        ("matquant model.path=./exper", set()),
        ("matquant pack=", {f"pack={path.stem}" for path in (ROOT / "conf" / "pack").glob("*.yaml")}),
    ],
)
def test_words_at_the_cursor(line, words, complete):
    status, found, _ = complete("query", line)
    assert (status, set(found.split())) == (0, words)


def test_an_unknown_command_gives_no_words(complete):
    status, found, said = complete("query", "matquant quantise method=")
    assert (status, found) == (2, "")
    assert "'quantise' is no command" in said


@pytest.mark.parametrize("arguments", [[], ["csh"], ["bash", "zsh"]])
def test_another_shell_is_refused(arguments, complete):
    status, _, said = complete(*arguments)
    assert status == 2
    assert "one of bash, zsh, fish" in said


# Keys that are typed, and the command that then runs.
TYPED = {
    "matquant quan\t": ["matquant", "quantize"],
    "matquant pack method=rt\t": ["matquant", "pack", "method=rtn"],
    "matquant method=rtn method.group_s\t64": ["matquant", "method=rtn", "method.group_size=64"],
    "matquant model.path=./CONTRI\t": ["matquant", "model.path=./CONTRIBUTING.md"],
    "python run.py method=rt\t": ["python", "run.py", "method=rtn"],
    "python docs/hoo\t": ["python", "docs/hooks.py"],
    "python docs/hooks.py method=rt\t": ["python", "docs/hooks.py", "method=rt"],
}


@pytest.fixture
def programs(tmp_path):
    """Folder with ``matquant`` and ``python``, which complete as the real ones do and otherwise write down their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, completes, script in (("matquant", "$1", f"{ROOT}/run.py"), ("python", "$2", "")):
        (folder / name).write_text(
            f'#!/bin/sh\n[ "{completes}" = completion ] && exec "{sys.executable}" {script} "$@"\n'
            f'printf "%s\\n" {name} "$@" > "{tmp_path}/part" && mv "{tmp_path}/part" "{tmp_path}/arguments"\n'
        )
        (folder / name).chmod(0o755)
    return folder


class Shell:
    """Interactive shell in a terminal, which finds the programs first."""

    def __init__(self, name, programs):
        self.written = programs.parent / "arguments"
        process, self.terminal = pty.fork()
        if process == 0:
            os.chdir(ROOT)
            environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "TERM": "dumb"}
            os.execvpe(name, [name, *SHELLS[name], "-i"], environment)
        self.process = process

    def run(self, keys):
        """Command and arguments that run after some keys and Return."""
        self.written.unlink(missing_ok=True)
        os.write(self.terminal, f"{keys}\n".encode())
        shown = b""
        deadline = time.monotonic() + 60
        while not self.written.exists():
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            if select.select([self.terminal], [], [], 0.02)[0]:
                shown += os.read(self.terminal, 65536)
        return self.written.read_text().splitlines()

    def close(self):
        os.close(self.terminal)
        os.waitpid(self.process, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELLS)
def test_tab_in_a_real_shell(name, programs):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    shell = Shell(name, programs)
    try:
        shell.run(f"{LOAD[name]}; matquant loaded")
        assert {keys: shell.run(keys) for keys in TYPED} == TYPED
    finally:
        shell.close()
