"""Completion in shells: the candidates, and scripts of our own that ask for them.

Typer's script for zsh hands candidates to ``eval``, where a target named ``\\$(command)`` runs; its script for bash cuts
``status:failed`` at the colon. These read lines, a candidate and its help with a tab between, and evaluate nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Final

import typer

from mljobs.cli._settings import SHARED, given, job_class, open_store

VARIABLE: Final = "_MLJOBS_COMPLETE"
"""In the environment of a call that completes; it holds the name of the shell."""
FILES: Final = 1
"""The exit code of a call that completes nothing, where a file may be meant."""
_RECENT = 50
_SAFE = re.compile(r"[\w@%+=:,./-]")

SCRIPTS: Final = {
    "bash": r"""_mljobs() {
    local line output
    COMPREPLY=()
    export _MLJOBS_LINE="${COMP_LINE:0:COMP_POINT}" _MLJOBS_BREAKS="$COMP_WORDBREAKS"
    if ! output="$(_MLJOBS_COMPLETE=bash "$1" 2>/dev/null)"; then
        compopt -o default
        return
    fi
    while read -r line; do
        [[ -n "$line" ]] && COMPREPLY+=("$line")
    done <<< "$output"
    if (( ${#COMPREPLY[@]} == 0 )); then
        return
    elif [[ "${COMPREPLY[0]}" == *[:=] ]]; then
        compopt -o nospace
    fi
}
complete -F _mljobs mljobs
""",
    "zsh": r"""#compdef mljobs
_mljobs() {
    local -a values shown
    local line output
    if ! output="$(_MLJOBS_COMPLETE=zsh "${words[1]}" "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)"; then
        _files
        return
    fi
    for line in "${(@f)output}"; do
        [[ -n "$line" ]] || continue
        values+=("${line%%$'\t'*}")
        shown+=("${line/$'\t'/  }")
    done
    (( $#values )) || return 1
    if [[ "$values[1]" == *: ]]; then
        compadd -U -S '' -l -d shown -a values
    else
        compadd -U -l -d shown -a values
    fi
}
if [[ "$funcstack[1]" == _mljobs ]]; then
    _mljobs "$@"
else
    compdef _mljobs mljobs
fi
""",
    "fish": r"""function __mljobs_complete
    set -l words (commandline -opc)
    env _MLJOBS_COMPLETE=fish $words[1] $words[2..] (commandline -ct) 2>/dev/null
    or __fish_complete_path (commandline -ct)
end
complete -c mljobs -f -a '(__mljobs_complete)'
""",
}
"""The script for each shell."""


def completion(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print the script that teaches a shell the commands, options, kinds, states, targets and ids of recent jobs.

    \b
    Example:
      $ mljobs completion bash > ~/.local/share/bash-completion/completions/mljobs
      $ mljobs completion zsh > "${fpath[1]}/_mljobs"
      $ mljobs completion fish > ~/.config/fish/completions/mljobs.fish
    """
    if shell not in SCRIPTS:
        raise typer.BadParameter(f"there is a script for {', '.join(SCRIPTS)}, not for {shell!r}")
    sys.stdout.write(SCRIPTS[shell])


# ---------------------------------------------------------------------------------------------------------- candidates


Candidates = list[tuple[str, str]]
"""What could stand there, and what it is."""


def _ids(begun: str) -> Candidates:
    """Return the ids of recent jobs that begin so; without any, the one that ends so."""
    with open_store() as store:
        found = store.summaries(limit=_RECENT, text=0).jobs
    shown = [(str(job.id), f"{job.status} {job.kind} {job.target_name}") for job in found]
    ending = [one for one in shown if begun and one[0].endswith(begun)]
    return [one for one in shown if one[0].startswith(begun)] or (ending if len(ending) == 1 else [])


def _kinds(begun: str) -> Candidates:
    return _beginning(begun, (kind.value for kind in job_class().__kinds__))


def _targets(begun: str) -> Candidates:
    with open_store() as store:
        return [(name, "") for name in store.target_names(prefix=begun, limit=_RECENT)]


def _filters(begun: str) -> Candidates:
    """Return the fields of a filter, or what one of them can hold; the last of several, after a comma."""
    from mljobs.jobs import Filter  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.states import MlJobStatus  # noqa: PLC0415

    name, colon, value = begun.partition(":")
    if not colon:
        return _beginning(name, (f"{field.name}:" for field in Filter.fields(job_class())))
    if name == "target":
        return [(f"target:{target}", "") for target, _ in _targets(value)]
    before, _, value = value.rpartition(",")
    tokens = {"status": MlJobStatus, "kind": job_class().__kinds__}.get(name, ())
    start = f"{name}:{before}," if before else f"{name}:"
    return _beginning(begun, (f"{start}{token.value}" for token in tokens if token.value not in before.split(",")))


def _ids_or_filters(begun: str) -> Candidates:
    return [*_filters(begun), *(_ids(begun) if ":" not in begun else [])]


def _beginning(begun: str, candidates: Iterable[str]) -> Candidates:
    return [(candidate, "") for candidate in candidates if candidate.startswith(begun)]


def _of(*words: str) -> Callable[[str], Candidates]:
    return lambda begun: _beginning(begun, words)


VALUES: Final[dict[str, Callable[[str], Candidates]]] = {
    "job": _ids,
    "jobs": _ids_or_filters,
    "words": _filters,
    "kind": _kinds,
    "kinds": _kinds,
    "target": _targets,
    "shell": _of(*SCRIPTS),
    "order": _of("newest", "oldest"),
    "on_conflict": _of("skip", "update", "error"),
}
"""What can stand for an argument or an option, by the name of the parameter."""


# --------------------------------------------------------------------------------------------------------- the answer


def answer(group: Any) -> None:
    """Print what could stand at the end of the line, and exit; errors print nothing.

    Args:
        group: The command with its commands.
    """
    shell = os.environ[VARIABLE]
    words = _of_line(os.environ.get("_MLJOBS_LINE", "")) if shell == "bash" else sys.argv[1:]
    before, begun = words[:-1], words[-1] if words else ""
    try:
        found = candidates(group, before, begun)
    except Exception:  # noqa: BLE001 - a shell that completes shows no errors
        found = []
    if found is None:
        sys.exit(FILES)
    broken = _broken(begun) if shell == "bash" else 0
    for value, about in found:
        if not value.isprintable():  # nobody can type it
            continue
        if shell == "bash":
            shown = "".join(c if _SAFE.match(c) else f"\\{c}" for c in value[broken:])
        else:
            shown = f"{value}\t{_one_line(about)}" if about else value
        sys.stdout.write(f"{shown}\n")
    sys.stdout.flush()
    sys.exit(0)


def _of_line(line: str) -> list[str]:
    """Return the words after the command; the last one is what is being typed."""
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        return [*words[1:], ""] if line[-1:].isspace() and not closing else words[1:]
    return []


def _broken(begun: str) -> int:
    """Return how much of the word bash takes for words before it: it breaks words at colons."""
    breaks = [begun.rfind(c) + 1 for c in os.environ.get("_MLJOBS_BREAKS", ":=") if not c.isspace()]
    return max(breaks, default=0)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def candidates(group: Any, before: Sequence[str], begun: str) -> Candidates | None:
    """Return what could stand after these words; None where it is a file, or anything.

    Args:
        group: The command with its commands.
        before: The words between the command and the one that is being typed.
        begun: What is typed of that.
    """
    at = 0
    while at < len(before) and before[at].startswith("-"):  # options that all commands share
        at += 1 if "=" in before[at] else 2
    _keep_shared(before)
    if at >= len(before):
        if at > len(before):
            return None
        options = _options(group.params, begun) if begun.startswith("-") else []
        return options or [(name, group.about(name)) for name in group.list_commands(None) if name.startswith(begun)]
    command = group.get_command(None, before[at])
    if command is None:
        return []
    return _in_command(command.params, before[at + 1 :], begun)


def _keep_shared(words: Sequence[str]) -> None:
    """Look where the line says that the jobs are."""
    for at, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in SHARED and (equals or at + 1 < len(words)):
            given[name] = value if equals else words[at + 1]


def _in_command(parameters: Sequence[Any], words: Sequence[str], begun: str) -> Candidates | None:
    by_option = {name: one for one in parameters for name in one.opts if name.startswith("-")}
    if words and words[-1] in by_option and not by_option[words[-1]].is_flag:
        return _values(by_option[words[-1]].name, begun)
    if begun.startswith("-"):
        name, equals, value = begun.partition("=")
        if not equals:
            return _options(parameters, begun)
        found = _values(by_option[name].name, value) if name in by_option else []
        return None if found is None else [(f"{name}={one}", about) for one, about in found]
    places = [one for one in parameters if one.param_type_name == "argument"]
    taken = 0
    for at, word in enumerate(words):
        option = by_option.get(words[at - 1]) if at else None
        taken += not word.startswith("-") and (option is None or option.is_flag)
    if not places or (taken >= len(places) and places[-1].nargs == 1):
        return []
    return _values(places[min(taken, len(places) - 1)].name, begun)


def _values(name: str, begun: str) -> Candidates | None:
    return VALUES[name](begun) if name in VALUES else None


def _options(parameters: Sequence[Any], begun: str) -> Candidates:
    return [
        (name, str(getattr(one, "help", None) or ""))
        for one in parameters
        for name in one.opts
        if name.startswith("--") and name.startswith(begun) and not getattr(one, "hidden", False)
    ]
