"""Sets fields of a config from the command line: `--config.optimizer.learning_rate=0.01`."""

from collections.abc import Iterable, Sequence
from typing import Any

from klbox_jax.config.family import ConfigError, closest, load_base
from klbox_jax.config.field_types import OPTIONAL_GROUPS, PATHS
from klbox_jax.config.paths import local_path
from klbox_jax.config.saved import FREE_FIELDS
from klbox_jax.config.values import parse_value


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Separates the fields `--config.NAME=VALUE` from the other arguments.

    `--config.NAME VALUE`, and `--config.NAME` and `--noconfig.NAME` for a field that is true or false, are the other
    spellings.

    Returns:
        The names with their values, None for a name without one; and the other arguments in their order.
    """
    fields, others = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            others += [argument, *waiting]
        elif argument.startswith(("--config.", "-config.")):
            name, given, value = argument.partition(".")[2].partition("=")
            if not given and not _is_switch(name):
                value = next(waiting, None)
                if value is None or value.startswith("--"):
                    raise ConfigError(f"--config.{name}: the value is missing; write --config.{name}=VALUE")
            elif not given:
                value = None
            fields.append((name, value))
        elif argument.startswith("--noconfig."):
            fields.append((argument.removeprefix("--noconfig."), "false"))
        else:
            others.append(argument)
    return fields, others


def apply_overrides(config: Any, fields: Iterable[tuple[str, str | None]]) -> None:
    """Sets fields of a config.

    Args:
        config: a `ConfigDict`, changed in place.
        fields: dotted names and texts; None is true.

    Raises:
        ConfigError: there is no such field (the message names the closest), or the text does not fit its type.
    """
    for name, text in fields:
        group, key = _find(config, name, text)
        current = group[key]
        text = "true" if text is None else text
        if name in OPTIONAL_GROUPS and text == "None":
            value = None
        elif hasattr(current, "to_dict"):
            inner = ", ".join(f"{name}.{field}" for field in current)
            raise ConfigError(f"--config.{name}={text}: {name} is a group of fields; set one of {inner}")
        else:
            value = parse_value(name, text, current)
        with config.unlocked():
            # Deleted, because a ConfigDict would turn a number of steps, in place of a share, into a float.
            del group[key]
            group[key] = value


def with_local_paths(config: Any) -> Any:
    """Returns the config with the home folder for a leading `~` in its paths.

    Raises:
        ConfigError: a path has a scheme such as `gs://`.
    """
    changed = {}
    for name in PATHS:
        group, _, key = name.rpartition(".")
        value = config.get(group, {}).get(key)
        if isinstance(value, str) and value:
            path = local_path(value, f"config.{name}")
            if path != value:
                changed[name] = path
    if changed:
        is_locked = config.is_locked
        config = config.copy_and_resolve_references().unlock()
        config.update_from_flattened_dict(changed)
        if is_locked:
            config.lock()
    return config


def fill_free_fields(config: Any) -> None:
    """Adds the fields that an older run's config lacks and that do not change what it learned, with their defaults."""
    base = load_base().BASE
    with config.unlocked():
        for name in FREE_FIELDS:
            *groups, last = name.split(".")
            values, target = base, config
            for group in groups:
                values = values[group]
                if group not in target:
                    target[group] = {}
                target = target[group]
            if last not in values:
                continue
            if not isinstance(values[last], dict):
                if last not in target:
                    target[last] = values[last]
                continue
            if last not in target:
                target[last] = {}
            for field, value in values[last].items():
                # The default of a post-processing is that of PostprocessSettings, with which the older run worked.
                if field not in target[last] and last != "postprocess":
                    target[last][field] = value


def check_complete(config: Any, *, source: str) -> None:
    """Raises ConfigError if a config lacks a field that every config has; `source` names the config."""
    missing = [name for name in _required(load_base().BASE) if not _has(config, name)]
    if missing:
        raise ConfigError(
            f"{source} lacks {', '.join(f'config.{name}' for name in missing[:5])}"
            f"{f' and {len(missing) - 5} more fields' if len(missing) > 5 else ''}; start from configs.common.base(), "
            "which has every field"
        )


def _required(base: dict[str, Any]) -> list[str]:
    """Returns the fields that the program reads of every config; those of the network depend on its parts."""
    names = []
    for group, value in base.items():
        if not isinstance(value, dict):
            names.append(group)
        elif group == "model":
            names += [f"model.{key}" for key in value]
        else:
            names += [f"{group}.{key}" for key in value]
    optional = {
        "postprocess",
        "data.allow_links",
        "data.annotation_file",
        "data.image_dir",
        "data.voc_first_pixel",
    }
    return [name for name in names if name not in optional and not name.startswith("postprocess.")]


def _has(config: Any, name: str) -> bool:
    group = config
    for key in name.split("."):
        if group is None or not hasattr(group, "keys") or key not in group:
            return False
        group = group[key]
    return True


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields of a config."""
    names = []
    for key, value in config.items():
        if hasattr(value, "items"):
            names += field_names(value, f"{prefix}{key}.")
        else:
            names.append(prefix + key)
    return names


def _find(config: Any, name: str, text: str | None) -> tuple[Any, str]:
    """Returns the group of a field and the field's key."""
    shown = f"--config.{name}" if text is None else f"--config.{name}={text}"
    group, *keys = config, *name.split(".")
    for depth, key in enumerate(keys):
        above = ".".join(keys[:depth])
        if group is None:
            raise ConfigError(f"{shown}: {above} is None in this config and has no fields")
        if not hasattr(group, "items"):
            raise ConfigError(
                f"{shown}: {above} is a field, not a group of fields; write --config.{above}=VALUE"
            )
        if key not in group:
            likely = _closest_fields(name, field_names(config))
            hint = (
                f"the closest is {' or '.join(likely)}"
                if likely
                else f"{above or 'it'} has {', '.join(group)}"
            )
            raise ConfigError(
                f"{shown}: the config has no field {name}; {hint} (`klbox configs NAME` lists all fields)"
            )
        if depth < len(keys) - 1:
            group = group[key]
    return group, keys[-1]


def _closest_fields(name: str, known: list[str]) -> list[str]:
    """Returns the fields most like a name: by initials (lr for learning_rate), by the last part, or as a whole."""
    last = name.rpartition(".")[2]
    by_last = {field.rpartition(".")[2]: field for field in reversed(known)}
    initials = [
        field for field in known if "".join(word[:1] for word in field.rpartition(".")[2].split("_")) == last
    ]
    same_group = [field for field in initials if field.rpartition(".")[0] == name.rpartition(".")[0]]
    if same_group or initials:
        return (same_group or initials)[:2]
    whole = closest(name, known, count=1)
    return whole or [by_last[word] for word in closest(last, list(by_last), count=1)]


def _is_switch(name: str) -> bool:
    """Returns True for a field of every config that is true or false."""
    value: Any = load_base().BASE
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return isinstance(value, bool)
