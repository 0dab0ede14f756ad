"""`megadpo completion bash|zsh|fish`: by it a shell completes commands, options, keys and their values.

It is made of the parser and the options themselves, and asks nobody while it completes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megadpo.config.schema import Config
from megadpo.objectives.specs import SPECS
from megadpo.validation.values import CHOICES

HELP = "a script for bash, zsh or fish that completes commands, options and keys"

WHERE = {
    "bash": "source <(megadpo completion bash)          # in ~/.bashrc",
    "zsh": "source <(megadpo completion zsh)           # in ~/.zshrc, after compinit",
    "fish": "megadpo completion fish > ~/.config/fish/completions/megadpo.fish",
}


@dataclass(frozen=True)
class Words:
    """What may follow a command.

    Attributes:
        help: a line on the command.
        options: with their dashes.
        choices: of options that have some.
        plain: words without dashes: directions of `convert`, shells of `completion`.
        has_keys: it takes ``section.key=value``.
    """

    help: str
    options: tuple[str, ...]
    choices: dict[str, tuple[str, ...]]
    plain: tuple[str, ...]
    has_keys: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "\n".join(WHERE.values())
    parser.add_argument("shell", metavar="SHELL", choices=tuple(WHERE), help="bash, zsh or fish")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    print(script(arguments.shell, arguments.whole), end="")
    return 0


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell, of the parser of the whole command line."""
    made: dict[str, Callable[[dict[str, Words]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return "\n".join(made[shell](words_of(parser))) + "\n"


def words_of(parser: argparse.ArgumentParser) -> dict[str, Words]:
    """What may follow each command, by its name."""
    (commands,) = _subparsers(parser)
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return {name: _of(helps[name], command) for name, command in commands.choices.items()}


def _of(line: str, command: argparse.ArgumentParser) -> Words:
    options, choices, plain, has_keys = list[str](), dict[str, tuple[str, ...]](), list[str](), False
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            plain += action.choices
            options += [name for direction in action.choices.values() for name in _of("", direction).options]
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            options += action.option_strings
            if action.choices:
                choices |= dict.fromkeys(action.option_strings, tuple(map(str, action.choices)))
        elif action.choices:
            plain += map(str, action.choices)
        has_keys = has_keys or action.dest == "override"
    return Words(line, tuple(dict.fromkeys(options)), choices, tuple(plain), has_keys)


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse._SubParsersAction[argparse.ArgumentParser]]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def keys() -> list[str]:
    """Every key of the configuration, dotted."""
    sections = [(one.name, getattr(Config(), one.name)) for one in dataclasses.fields(Config)]
    nested = [(name, value) for name, value in sections if dataclasses.is_dataclass(value)]
    dotted = [f"{name}.{field.name}" for name, value in nested for field in dataclasses.fields(value)]
    return [*dotted, *(name for name, value in sections if not dataclasses.is_dataclass(value))]


def values() -> dict[str, tuple[str, ...]]:
    """What keys may be, of those that have a few values."""
    truths: dict[str, tuple[str, ...]] = {"objective.loss_type": tuple(SPECS)}
    for dotted in keys():
        section, _, name = dotted.partition(".")
        if name and isinstance(getattr(getattr(Config(), section), name), bool):
            truths[dotted] = ("true", "false")
    return CHOICES | truths


def _bash(commands: dict[str, Words]) -> Iterator[str]:
    yield f"# {WHERE['bash']}"
    yield "_megadpo() {"
    yield '    local word command="" key="" words="" prefix="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"'
    yield '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield '        [[ "$word" != -* ]] && { command="$word"; break; }'
    yield "    done"
    # bash takes `=` for a word of its own.
    yield '    [[ "$prefix" == "=" ]] && { key="$before"; prefix=""; }'
    yield '    [[ "$before" == "=" ]] && key="${COMP_WORDS[COMP_CWORD-2]}"'
    yield f'    local keys="{" ".join(f"{key}=" for key in keys())}"'
    yield '    if [[ -n "$key" ]]; then case "$key" in'
    for dotted, choices in values().items():
        yield f'        {dotted}) words="{" ".join(choices)}" ;;'
    yield '    esac; else case "$command" in'
    yield f'        "") words="{" ".join(commands)} --help --version" ;;'
    for name, one in commands.items():
        yield f'        {name}) words="{" ".join((*one.plain, *one.options))}{" $keys" * one.has_keys}" ;;'
    yield '    esac; case "$command $before" in'
    for name, one in commands.items():
        for option, choices in one.choices.items():
            yield f'        "{name} {option}") words="{" ".join(choices)}" ;;'
    yield "    esac; fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$prefix"))'
    yield '    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace 2>/dev/null'
    yield "    return 0"
    yield "}"
    yield "complete -o default -F _megadpo megadpo  # where nothing fits: files"


def _zsh(commands: dict[str, Words]) -> Iterator[str]:
    yield "#compdef megadpo"
    yield f"# {WHERE['zsh']}"
    yield "_megadpo() {"
    yield "    local word command=''"
    yield "    local -a plain options keys choices"
    yield "    for word in ${words[2,CURRENT-1]}; do"
    yield "        [[ $word != -* ]] && { command=$word; break }"
    yield "    done"
    yield "    case $command in"
    yield f"        '') plain=({' '.join(commands)}) options=(--help --version) ;;"
    for name, one in commands.items():
        more = f" keys=({' '.join(f'{key}=' for key in keys())})" * one.has_keys
        yield f"        {name}) plain=({' '.join(one.plain)}) options=({' '.join(one.options)}){more} ;;"
    yield "    esac"
    yield '    case "$command ${words[CURRENT-1]}" in'
    for name, one in commands.items():
        for option, choices in one.choices.items():
            yield f"        '{name} {option}') compadd -- {' '.join(choices)}; return ;;"
    yield "    esac"
    yield "    case $PREFIX in"
    yield "        -*) compadd -- $options ;;"
    yield "        *=*)"
    yield "            word=${PREFIX%%=*}; compset -P '*='"
    yield "            case $word in"
    for dotted, choices in values().items():
        yield f"                {dotted}) choices=({' '.join(choices)}) ;;"
    yield "            esac"
    yield "            if (( $#choices )); then compadd -- $choices; else _files; fi ;;"
    yield "        *) compadd -- $plain; compadd -S '' -- $keys; [[ -n $command ]] && _files ;;"
    yield "    esac"
    yield "}"
    yield 'if [[ "${funcstack[1]}" == _megadpo ]]; then _megadpo "$@"; else compdef _megadpo megadpo; fi'


def _fish(commands: dict[str, Words]) -> Iterator[str]:
    yield f"# {WHERE['fish']}"
    yield "function __megadpo_command"
    yield "    for word in (commandline -opc)[2..]"
    yield "        string match -q -- '-*' $word; or begin; echo $word; return; end"
    yield "    end"
    yield "end"
    yield "function __megadpo_after"
    yield '    test "$(__megadpo_command)" = "$argv[1]"'
    yield "end"
    yield "complete -c megadpo -n '__megadpo_after \"\"' -f -l help"
    yield "complete -c megadpo -n '__megadpo_after \"\"' -f -l version"
    for name, one in commands.items():
        line = one.help.replace("\\", "\\\\").replace("'", "\\'")
        yield f"complete -c megadpo -n '__megadpo_after \"\"' -f -a {name} -d '{line}'"
        after = f"complete -c megadpo -n '__megadpo_after {name}'"
        for option in one.options:
            if option.startswith("--"):
                chosen = one.choices.get(option)
                yield f"{after} -l {option[2:]}" + (f" -x -a '{' '.join(chosen)}'" if chosen else "")
        if one.plain:
            yield f"{after} -f -a '{' '.join(one.plain)}'"
    having = [name for name, one in commands.items() if one.has_keys]
    after = f"complete -c megadpo -n 'contains -- (__megadpo_command) {' '.join(having)}'"
    known = values()
    words = [f"{key}={value}" for key in keys() for value in known.get(key, ("",))]
    yield f"{after} -a '{' '.join(words)}'"
