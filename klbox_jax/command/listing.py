"""Lists the configs, and the fields of one."""

import textwrap
from typing import Any

from klbox_jax.command.arguments import WIDTH
from klbox_jax.config.family import explanations, family_files, first_line
from klbox_jax.config.overrides import field_names


def list_families() -> str:
    """Returns a line for each family."""
    files = family_files()
    width = max(map(len, files))
    lines = [f"  {name:{width}}  {first_line(file)}" for name, file in files.items()]
    return "\n".join(
        [
            *lines,
            "",
            "klbox configs NAME lists the fields of one with their values; NAME:loss=smooth_l1 is a variant.",
        ]
    )


def list_fields(config: Any) -> str:
    """Returns the fields of a config, each with its value and its explanation."""
    texts = explanations()
    lines = []
    for name in field_names(config):
        value: Any = config
        for key in name.split("."):
            value = value[key]
        head = f"{name} = {value!r}"
        text = texts.get(name, "")
        if len(head) <= 58:
            lines += textwrap.wrap(f"{head:60}{text}", WIDTH + 40, subsequent_indent=" " * 60)
        else:
            lines += [
                head,
                *textwrap.wrap(text, WIDTH + 40, initial_indent=" " * 60, subsequent_indent=" " * 60),
            ]
    return "\n".join(lines)
