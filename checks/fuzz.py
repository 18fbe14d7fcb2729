"""Damages small files at random, and checks that the readers of untrusted files read or refuse them.

    python -m checks.fuzz --output=runs/fuzz

Annotations in the formats of COCO and VOC, images, and weight files are made from valid ones by random changes
(`fuzz_seeds.py`). A reader may read such a file or refuse it with the error that it documents, in five seconds and one
gigabyte (`fuzz_readers.py`). Anything else counts as a crash or as a hang, and its file is kept in `crashes/`. A file
whose reading runs code, starts a program, connects to anything or opens a file for writing counts as a crash too;
Python's audit events show it.

A case is a function of its kind, its number and the seed. Writes fuzz.json, and exits with 1 if there was a crash or a
hang.
"""

import codecs
import collections
import json
import logging as python_logging
import multiprocessing
import os
import pathlib
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any

import numpy as np
import tqdm
from absl import flags
from PIL import Image

from checks.fuzz_readers import Outcome, Readers, make_case, read_file, seeds_of
from klbox_jax import cli
from klbox_jax.files import write_json

MEMORY = 2**30
CASES_OF_A_WORKER = 2000
# Seconds without an answer, imports included, after which a worker hangs where no signal reaches it.
PATIENCE = 80.0
WORKERS = 2


def _work(pipe: connection.Connection, kind: str, start: int, stop: int, seed: int) -> None:
    """Sends the outcome of each case; the function of a worker process."""
    warnings.simplefilter("ignore")
    python_logging.disable(python_logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries of some formats print errors
    # Modules that are imported when they are first needed.
    Image.init()
    for encoding in ("raw_unicode_escape", "unicode_escape"):
        codecs.lookup(encoding)
    with Readers(watch=True) as readers:
        for name, data in seeds_of(kind).items():
            readers.path(kind, name).write_bytes(data)
            read_file(kind, readers.path(kind, name), np.random.default_rng(0))
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for index in range(start, stop):
            pipe.send(readers.run(kind, index, seed))


def fuzz(counts: dict[str, int], *, seed: int) -> Iterator[Outcome]:
    """Yields the outcome of every case, read by two processes that are replaced regularly."""
    context = multiprocessing.get_context("forkserver")
    # Slow imports are done once.
    context.set_forkserver_preload([Readers.__module__])
    waiting = [
        (kind, start, min(start + CASES_OF_A_WORKER, count))
        for kind, count in counts.items()
        for start in range(0, count, CASES_OF_A_WORKER)
    ][::-1]
    running: dict[connection.Connection, list] = {}  # process, kind, next case, end, time of the last answer
    while waiting or running:
        while waiting and len(running) < WORKERS:
            kind, start, stop = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, kind, start, stop, seed))
            process.start()
            theirs.close()
            running[ours] = [process, kind, start, stop, time.monotonic()]
        for pipe in connection.wait(list(running), timeout=1.0):
            try:
                outcome = pipe.recv()
                running[pipe][2] = outcome.index + 1
                running[pipe][4] = time.monotonic()
                yield outcome
            except EOFError:
                running[pipe][4] = -1.0
        for pipe, (process, kind, index, stop, answered) in list(running.items()):
            has_ended = answered < 0
            if not has_ended and time.monotonic() - answered < PATIENCE:
                continue
            process.join(5.0 if has_ended else 0.0)
            process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            if index < stop:
                text = f"the process ended with {process.exitcode}" if has_ended else "no signal reaches it"
                yield Outcome(kind, index, "", "crash" if has_ended else "hang", text)
                waiting.append((kind, index + 1, stop))


def normalized(message: str) -> str:
    """Returns a message without the parts that differ between cases."""
    message = re.sub(r"refused to load .*?, which", "refused to load ..., which", message)
    message = re.sub(r"0x[0-9a-f]+", "#", message)
    message = re.sub(r"'[^']*'|\"[^\"]*\"|b'.*?'", "'...'", message)
    message = re.sub(r"\(.*\)|\[.*\]|\{.*\}", "(...)", message)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", message)[:110]


def summarize(outcomes: list[Outcome]) -> dict[str, Any]:
    """Returns the content of fuzz.json."""
    verdicts = collections.Counter((outcome.group, outcome.verdict) for outcome in outcomes)
    groups = sorted({group for group, _ in verdicts})
    total = {group: sum(n for (other, _), n in verdicts.items() if other == group) for group in groups}
    shares = {
        verdict: {group: round(verdicts[group, verdict] / total[group], 4) for group in groups}
        for verdict in ("read", "refused")
    }
    messages = collections.Counter(normalized(o.text) for o in outcomes if o.verdict == "refused")
    kinds = collections.Counter("annotations" if o.kind in ("coco", "voc") else o.kind for o in outcomes)
    return {
        **{name: kinds[name] for name in ("annotations", "images", "weights")},
        "crashes": sum(n for (_, verdict), n in verdicts.items() if verdict == "crash"),
        "hangs": sum(n for (_, verdict), n in verdicts.items() if verdict == "hang"),
        "read_share": shares["read"],
        "refused_share": shares["refused"],
        "distinct_messages": len(messages),
        "messages": dict(messages.most_common()),
    }


def run(counts: dict[str, int], *, seed: int, output: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, keeps the files of crashes and hangs, and writes and returns the summary."""
    started = time.monotonic()
    outcomes = []
    bar = tqdm.tqdm(fuzz(counts, seed=seed), total=sum(counts.values()), unit="file", disable=None)
    for outcome in bar:
        outcomes.append(outcome)
        if outcome.verdict in ("crash", "hang"):
            name, data, _ = make_case(outcome.kind, outcome.index, seed)
            path = output / "crashes" / f"{outcome.kind}_{outcome.index}_{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            text = f"{outcome.verdict}\n{outcome.text}"
            path.with_name(f"{path.name}.txt").write_text(text, "utf-8", "replace")
    summary = {"seed": seed, **summarize(outcomes), "seconds": round(time.monotonic() - started, 1)}
    write_json(output / "fuzz.json", summary)
    return summary


def main(_: list[str]) -> None:
    """Runs all cases, prints the summary, and exits with 1 after a crash or a hang."""
    # Two files of three are COCO's: it has more to get wrong.
    voc = _ANNOTATIONS.value // 3
    counts = {
        "coco": _ANNOTATIONS.value - voc,
        "voc": voc,
        "images": _IMAGES.value,
        "weights": _WEIGHTS.value,
    }
    summary = run(counts, seed=_SEED.value, output=pathlib.Path(_OUTPUT.value))
    for message, count in summary.pop("messages").items():
        print(f"{count:8d}  {message}")
    print(json.dumps(summary, indent=2))
    sys.exit(int(summary["crashes"] + summary["hangs"] > 0))


if __name__ == "__main__":
    _ANNOTATIONS = flags.DEFINE_integer("annotations", 100_000, "Annotation files.")
    _IMAGES = flags.DEFINE_integer("images", 20_000, "Images.")
    _WEIGHTS = flags.DEFINE_integer("weights", 20_000, "Weight files.")
    _SEED = flags.DEFINE_integer("seed", 0, "Another seed makes other files.")
    _OUTPUT = flags.DEFINE_string("output", "runs/fuzz", "Folder of the result.")
    cli.start(main)
