"""Shell completion: a script for bash, zsh or fish, which asks `moduseg completion words ...` what may follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf

from moduseg.cli.commands import COMMANDS
from moduseg.cli.options import list_keys
from moduseg.config import Config, compose_hydra, config_dir
from moduseg.config.overrides import keys_of_group
from moduseg.errors import ConfigError, ModusegError

SCRIPTS = {
    "bash": """\
_moduseg() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$' \\t\\n' words
    read -ra words <<< "$line"
    [[ $line == *' ' ]] && words+=('')
    IFS=$'\\n'
    COMPREPLY=($(moduseg completion words "${words[@]:1}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    # Bash takes the text after '=' as a word of its own.
    local current=${words[${#words[@]}-1]}
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%%=*}="}")
    return 0
}
complete -o default -F _moduseg moduseg
""",
    "zsh": """\
#compdef moduseg
_moduseg() {
    local -a candidates
    candidates=(${(f)"$(moduseg completion words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#candidates )); then
        # A value follows a key at once; after anything else comes a space.
        compadd -S '' -- ${(M)candidates:#*=}
        compadd -- ${candidates:#*=}
    else
        compset -P '*='
        _files
    fi
}
compdef _moduseg moduseg
""",
    "fish": """\
function __moduseg_complete
    set -l current (commandline -ct)
    set -l candidates (moduseg completion words (commandline -opc)[2..-1] "$current" 2>/dev/null | string match -v '')
    if test (count $candidates) -gt 0
        printf '%s\\n' $candidates
    else
        # A path, as an argument or as the value of a key.
        set -l key (string match -r '^[^=]*=' -- $current)
        for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- $current))
            printf '%s\\n' "$key$path"
        end
    end
end
complete -c moduseg -f -a '(__moduseg_complete)'
""",
}
"""Shell -> its script."""
_INSTALL = {
    "bash": 'eval "$(moduseg completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(moduseg completion zsh)" in ~/.zshrc, after compinit',
    "fish": "moduseg completion fish > ~/.config/fish/completions/moduseg.fish",
}


def complete(arguments: Sequence[str]) -> str:
    """Return what `moduseg completion <arguments>` prints.

    Args:
        arguments: the name of a shell, or `words` and the words of a command line after `moduseg`, the last of which is
            to be completed.

    Raises:
        ConfigError: no such shell.
    """
    if list(arguments[:1]) == ["words"]:
        return "\n".join(list_candidates(arguments[1:] or [""]))
    shell = arguments[0] if arguments else "nothing"
    if shell not in SCRIPTS:
        remedy = "; ".join(_INSTALL.values())
        raise ConfigError(f"completion: got {shell!r}, expected one of {', '.join(SCRIPTS)}; put {remedy}")
    return SCRIPTS[shell].rstrip()


def list_candidates(words: Sequence[str]) -> list[str]:
    """Return what the last of some words may become, sorted.

    Args:
        words: a command line after `moduseg`; the last one may be empty or the beginning of a word.
    """
    *earlier, current = words
    if not earlier:
        candidates = {*(name.split()[0] for name in COMMANDS), "completion", "--help", "--version"}
    elif earlier == ["completion"]:
        candidates = set(SCRIPTS)
    elif len(earlier) == 1 and earlier[0] not in COMMANDS:
        candidates = {name.split()[1] for name in COMMANDS if name.startswith(f"{earlier[0]} ")}
    else:
        candidates = _list_arguments(earlier, current)
    return sorted(candidate for candidate in candidates if candidate.startswith(current))


def _list_arguments(earlier: Sequence[str], current: str) -> set[str]:
    """Return keys, and the values of a key that stands in the current word."""
    name = earlier[0] if earlier[0] in COMMANDS else " ".join(earlier[:2])
    if name not in COMMANDS:
        return set()
    command, folder = COMMANDS[name], config_dir()
    key, equals, _ = current.partition("=")
    if equals and (folder / key.partition("@")[0]).is_dir():
        return {f"{key}={path.stem}" for path in (folder / key.partition("@")[0]).glob("*.yaml")}
    if equals:
        return {f"{key}={value}" for value in _list_values(key, command.options)}
    keys = set(list_keys(command.options)) if command.options is not None else set()
    if command.options is None or command.accepts != "none":
        keys |= _list_configuration([word for word in earlier[len(name.split()) :] if "=" in word], command.config_name)
    flags = {"--help"} if command.stage is None else {"--help", "--dry-run"}
    return flags | {f"{key}=" for key in keys}


def _list_configuration(overrides: Sequence[str], config_name: str) -> set[str]:
    """Return groups, and the keys of the files that the other words choose."""
    try:
        cfg = compose_hydra(overrides, config_name)
    except ModusegError:
        cfg = compose_hydra([], config_name)
    groups = {path.name for path in config_dir().iterdir() if path.name in (*cfg, "experiment") and path.is_dir()}
    keys = set(_list_leaves(OmegaConf.to_container(cfg), ""))
    defaults = {f"{group}.{key}" for group in groups for key in keys_of_group(group)}
    return groups | keys | {key for key in defaults if not any(other.startswith(f"{key}.") for other in keys)}


def _list_leaves(settings: Any, prefix: str) -> Iterator[str]:
    """Yield the keys of nested settings, `hydra` and lists left out."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _list_leaves(value, f"{prefix}{name}.") if name != "hydra" else ()
        else:
            yield f"{prefix}{name}"


def _list_values(key: str, options: type | None) -> list[str]:
    """Return the values of a key that has few."""
    *parents, last = key.split(".")
    cls = options if not parents else Config
    hint: object = None
    for name in [*parents, last]:
        hint = get_type_hints(cls).get(name) if isinstance(cls, type) and hasattr(cls, "__dataclass_fields__") else None
        cls = hint if isinstance(hint, type) else None
    if hint is bool:
        return ["true", "false"]
    return [value for value in get_args(hint) if isinstance(value, str)]
