"""Warnings that are said once a process."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Log a warning; the same one once a process."""
    logger.warning(message)
