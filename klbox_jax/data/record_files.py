"""Reading of ArrayRecord files that tensorflow-datasets prepared, with the name of a damaged file in every error."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from klbox_jax.data.source import DataError, Fault

_REMEDY = "Copy it again, or delete its folder and prepare the data set again."


class RecordFiles:
    """The record files of a prepared data set."""

    def __init__(self, builder: Any):
        """Takes a builder of tensorflow-datasets whose data are prepared."""
        splits = builder.info.splits
        self._paths = {name: [str(path) for path in split.filepaths] for name, split in splits.items()}
        self._ends = {name: list(itertools.accumulate(split.shard_lengths)) for name, split in splits.items()}

    def check(self, split: str) -> None:
        """Raises DataError if a file of a prepared split has another number of records than were written.

        Reads the end of each file only. array_record opens a file that was cut short, and says it has 0 records.
        """
        start = 0
        for path, end in zip(self._paths[split], self._ends[split], strict=True):
            count, reason = _count_records(path)
            if count != end - start:
                what = f"has {count} of the {end - start} records that were written, so it is cut short or damaged"
                raise DataError(
                    Fault(
                        kind="damaged record file",
                        file=path,
                        what=what + reason,
                        remedy=_REMEDY,
                        severity="fatal",
                    )
                )
            start = end

    def read(self, examples: Sequence[Any], row: int, place: tuple[str, int]) -> Any:
        """Returns an example; raises DataError with the name of its file if the record is damaged.

        Args:
            examples: of the builder's `as_data_source`.
            row: index in `examples`.
            place: the prepared split of the example, and its number there from 1.
        """
        try:
            return examples[row]
        except Exception as error:  # array_record and the parser of examples raise many types.
            split, number = place
            path = self._paths[split][bisect.bisect_left(self._ends[split], number)]
            fault = Fault(
                kind="damaged record file",
                file=path,
                record=f"record {number} of {split}",
                what=f"cannot be read, the file is damaged ({_reason(error)})",
                remedy=_REMEDY,
            )
            raise DataError(fault) from error


def _count_records(path: str) -> tuple[int, str]:
    """Returns the number of records of a file, and the reason for an error in brackets."""
    count, reason = 0, ""
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except Exception as error:  # On opening or on closing, depending on what is missing.
        reason = f" ({_reason(error)})" if str(error) else ""
    return count, reason


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
