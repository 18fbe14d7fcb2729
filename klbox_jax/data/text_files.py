"""Reading of small text files of strangers: lists, XML and label files, with their encodings."""

import codecs
import os
import re

from klbox_jax.data.source import DataError, Fault

_KIND = "unreadable annotations"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# An XML declaration in an encoding that contains ASCII, or in UTF-16 without a byte order mark.
_DECLARATION = re.compile(rb"""^<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")
_UTF16_STARTS = ((b"<\0?\0", "utf-16-le"), (b"\0<\0?", "utf-16-be"))
# Python's names of the text encodings that XML files are written in.
_ENCODINGS = re.compile(
    r"utf-8|utf-16(-[lb]e)?|ascii|iso8859-\d+|cp\d{3,4}|koi8-[rut]|mac-\w+|gb2312|gbk|gb18030|big5(hkscs)?"
    r"|shift_jis(_2004|x0213)?|euc_(jp|kr|jis_2004)|iso2022_jp|johab|tis-620"
)


def read_bytes(path: str, max_bytes: int, *, severity: str = "error") -> bytes:
    """Returns the content of a file of at most `max_bytes`.

    Args:
        path: the file.
        max_bytes: largest accepted size.
        severity: of the faults.

    Raises:
        DataError: the file is missing, not a file, or too large.
    """

    def error(what: str, remedy: str) -> DataError:
        return DataError(Fault(kind=_KIND, file=path, what=what, remedy=remedy, severity=severity))

    check_path = "Check the data set's path and split."
    try:
        size = os.path.getsize(path)
        # `isfile` also refuses a pipe, which would block the reader forever.
        if not os.path.isfile(path):
            raise error("is not a file", check_path)
        if size > max_bytes:
            raise error(f"is absurdly large ({size} bytes, the limit is {max_bytes})", "Restore the file.")
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except OSError as reason:
        raise error(f"cannot be read ({reason.strerror})", check_path) from reason


def read_text(path: str, max_bytes: int, *, severity: str = "error", xml: bool = False) -> str:
    """Returns the text of a file in UTF-8, or in the encoding of its byte order mark.

    Args:
        path: the file.
        max_bytes: largest accepted size.
        severity: of the faults.
        xml: use the encoding that an XML declaration names.

    Raises:
        DataError: the file cannot be read, or is not text in its encoding.
    """
    content = read_bytes(path, max_bytes, severity=severity)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "")
    if not encoding and xml:
        encoding = _declared_encoding(path, content)
    encoding = encoding or "utf-8"
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        shown = "UTF-8" if encoding == "utf-8" else encoding
        fault = Fault(
            kind=_KIND,
            file=path,
            what=f"is not {shown} text ({error})",
            remedy="Convert it to UTF-8.",
            severity=severity,
        )
        raise DataError(fault) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _declared_encoding(path: str, content: bytes) -> str:
    """Returns Python's name of the encoding that an XML declaration names, "" without one; raises DataError."""
    wide = next((name for start, name in _UTF16_STARTS if content.startswith(start)), "")
    if wide:
        return wide
    match = _DECLARATION.match(content.lstrip())
    if match is None:
        return ""
    declared = match[1].decode("ascii")
    try:
        name = codecs.lookup(declared).name
    except LookupError:
        name = ""
    if not _ENCODINGS.fullmatch(name) or name == "utf-16":  # UTF-16 has a byte order mark or null bytes.
        raise DataError(
            Fault(
                kind=_KIND,
                file=path,
                what=f"declares the encoding {declared!r}, which is unknown or is not that of the file",
                remedy="Convert it to UTF-8.",
            )
        )
    return name
