"""The old name of `family`."""

from .family import *  # noqa: F403
