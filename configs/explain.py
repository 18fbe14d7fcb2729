"""The explanation of each config field, read from the comments of configs/base.py."""

import ast
import inspect
import io
import tokenize

from configs import base


def explanations() -> dict[str, str]:
    """Returns one line for each field and each group of fields, by dotted name such as `train.batch_size`.

    A field of `base.BASE` is explained by the comment on its first line, another one by `base.EXTRA_FIELDS`. The
    mask pooler has the fields of the box pooler.
    """
    source = inspect.getsource(base)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string[2:] for token in tokens if token.type == tokenize.COMMENT}

    def read(call: ast.Call, prefix: str):
        for keyword in call.keywords:
            yield f"{prefix}{keyword.arg}", comments.get(keyword.lineno, "")
            if isinstance(keyword.value, ast.Call):
                yield from read(keyword.value, f"{prefix}{keyword.arg}.")

    (fields,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BASE"
    )
    found = dict(read(fields, "")) | base.EXTRA_FIELDS
    return found | {name.replace("box_pooler", "mask_pooler"): text for name, text in found.items()}
