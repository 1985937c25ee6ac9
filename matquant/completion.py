"""Completion of command lines in a shell: its scripts, and the words that may stand at the cursor.

A script calls ``matquant completion query LINE`` with the command line up to the cursor. Hydra's own scripts are not used: they
run any ``python FILE.py`` to get words, and have no commands.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable

from matquant.errors import UserError

# ``python run.py`` is completed too, if the file is this project's. Any other script of python is left alone.
_BASH = r"""
_matquant() {
    local program=("$1") line=${COMP_LINE:0:COMP_POINT} word
    if [[ ${1##*/} == python* ]]; then
        [[ ${COMP_WORDS[1]} == *run.py ]] && grep -qs 'from matquant.entry' "${COMP_WORDS[1]}" || return
        program+=("${COMP_WORDS[1]}")
    fi
    local cursor=${line##* }
    local kept=${cursor%"$2"}  # bash completes what follows the last = or :
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("${word#"$kept"}")
    done < <("${program[@]}" completion query "$line" 2> /dev/null)
    [[ ${COMPREPLY[*]} == *[=./] ]] || compopt +o nospace 2> /dev/null
}
complete -o nospace -o default -F _matquant matquant python python3
"""

_ZSH = r"""
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_matquant() {
    local program=("$words[1]") found
    if [[ ${words[1]:t} == python* ]]; then
        if [[ $words[2] != *run.py ]] || ! grep -qs 'from matquant.entry' $words[2]; then
            _files
            return
        fi
        program+=("$words[2]")
    fi
    found=(${(f)"$($program completion query "$words[1,CURRENT-1] $PREFIX" 2> /dev/null)"})
    if (( $#found )); then compadd -Q -S '' -- $found; else compset -P '*='; _files; fi
}
compdef _matquant matquant python python3
"""

_FISH = r"""
function __matquant
    set -l words (commandline -cpo)
    set -l program $words[1]
    if string match -q '*python*' -- $words[1]
        string match -q '*run.py' -- $words[2]; and grep -qs 'from matquant.entry' $words[2]; or return
        set program $words[1..2]
    end
    $program completion query (commandline -cp) 2> /dev/null
end
complete -c matquant -a '(__matquant)'
complete -c python -a '(__matquant)'
complete -c python3 -a '(__matquant)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Completion:
    """Words that may stand at the cursor of a command line.

    Args:
        commands: names of the commands.
        translate: overrides of the arguments before the cursor's word, in which a command may stand first.
        run: job of Hydra; it is called with Hydra's flag that prints words.
    """

    def __init__(
        self, commands: Iterable[str], translate: Callable[[list[str]], list[str]], run: Callable[[], object]
    ) -> None:
        self._commands = sorted(commands)
        self._translate = translate
        self._run = run

    def words(self, line: str) -> list[str]:
        """Words for the end of a line, which begins with ``matquant``, or with ``python run.py``.

        Raises:
            UserError: an argument before the cursor is no command or an old name of a setting.
        """
        _, *arguments = re.sub(r"^\s*\S*python\S*\s+\S+", "run.py", line).split(" ")
        *before, word = [argument for argument in arguments[:-1] if argument] + arguments[-1:] or [""]
        if re.search("=[./]", word) or before[:1] == ["serve"]:
            return []  # the shell completes files
        if not before:
            return [name for name in self._commands if name.startswith(word)] + self._settings([], word)
        if before[0] == "completion":
            return [shell for shell in _SCRIPTS if shell.startswith(word)]
        if before == ["store"]:
            actions = [found.removeprefix("store=") for found in self._settings([], f"store={word}")]
            return [action for action in actions if action != "default"]
        return self._settings(self._translate(before), word)

    def _settings(self, overrides: list[str], word: str) -> list[str]:
        """Hydra's words: groups and their presets, names of settings, the value that a setting has."""
        os.environ["COMP_LINE"] = " ".join(["matquant", *overrides, word])
        sys.argv[1:] = ["--shell-completion", "query=fish"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self._run()
        return [found for found in printed.getvalue().split("\n") if found and not found.startswith("schema")]


def command(arguments: list[str], completion: Completion) -> str:
    """Output of ``matquant completion``: the script of a shell, or after ``query`` the words for a line, one a row.

    Raises:
        UserError: the arguments name no shell.
    """
    match arguments:
        case ["query", line]:
            return "".join(f"{word}\n" for word in completion.words(line))
        case [shell] if shell in _SCRIPTS:
            return _SCRIPTS[shell].lstrip("\n")
    raise UserError(
        f"matquant completion needs the name of a shell, one of {', '.join(_SCRIPTS)}; found {' '.join(arguments)!r}."
    )
