"""Memory of the host that was freed, and that the C library keeps."""

import ctypes


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, where the C library is glibc; nothing happens elsewhere.

    Compiling a large training step frees hundreds of megabytes in pieces, which glibc keeps: the arrays of the step
    would come on top of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
