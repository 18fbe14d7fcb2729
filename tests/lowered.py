"""Counts operations in a lowered program, with those inside loops apart."""

from collections import Counter

# Operations whose cost on an accelerator does not follow from their size.
COUNTED = ("convolution", "dot_general", "scatter", "sort", "while", "gather")


def lower(function, *arguments, platform):
    """Returns the StableHLO module of a function for one platform."""
    return function.trace(*arguments).lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")


def count_operations(module) -> tuple[Counter, Counter]:
    """Returns how often each of `COUNTED` is in a module, and how often in the body of a loop.

    Calls are followed. Of the branches that are chosen by platform, the index of which is a constant here, only the
    chosen one counts.
    """
    functions = {str(op.attributes["sym_name"]).strip('"'): op for op in module.body.operations}
    everywhere, in_loops = Counter(), Counter()

    def visit(operation, in_loop):
        name = operation.operation.name
        if name == "func.call":
            callee = str(operation.operation.attributes["callee"]).lstrip("@").strip('"')
            visit_regions(functions[callee], in_loop)
            return
        short = name.removeprefix("stablehlo.").removeprefix("chlo.")
        short = "sort" if short == "top_k" else short
        if short in COUNTED:
            everywhere[short] += 1
            in_loops[short] += in_loop
        if name == "stablehlo.case":
            index = chosen(operation)
            if index is not None:
                visit_block(operation.operation.regions[index].blocks[0], in_loop)
                return
        visit_regions(operation, in_loop or name == "stablehlo.while")

    def visit_regions(operation, in_loop):
        for region in operation.operation.regions:
            for block in region.blocks:
                visit_block(block, in_loop)

    def visit_block(block, in_loop):
        for operation in block.operations:
            visit(operation, in_loop)

    visit_regions(functions["main"], False)
    return everywhere, in_loops


def chosen(case) -> int | None:
    """Returns the constant index of a case, or None if it is computed."""
    owner = case.operation.operands[0].owner
    while owner.name in ("stablehlo.clamp", "stablehlo.convert"):
        owner = owner.operands[1 if owner.name == "stablehlo.clamp" else 0].owner
    if owner.name != "stablehlo.constant":
        return None
    digits = "".join(c for c in str(owner.attributes["value"]).split(":")[0] if c.isdigit())
    return int(digits)
