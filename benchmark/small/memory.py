"""Makes CPU training several times faster by keeping freed memory in the process."""

import ctypes
import ctypes.util
import logging

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed memory instead of returning it to the system.

    Without this each large activation is mapped, zeroed and unmapped anew, which costs more than
    the arithmetic of a small model.

    Returns:
        Whether the C library took the settings; it does so on Linux with glibc only.
    """
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if not hasattr(library, "mallopt"):
        logger.info("this C library has no mallopt: memory settings stay as they are")
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 256 * 2**20}
    return all(library.mallopt(name, value) == 1 for name, value in settings.items())
