"""Messages under way: gloo loses one whose handle, or memory, is let go before it is delivered."""

from collections import deque
from typing import Any

from torch import Tensor

MOST_UNDER_WAY = 128


class Outbox:
    """Keeps what was sent without waiting; beyond `MOST_UNDER_WAY` the oldest is waited for."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Any, Tensor]] = deque()

    def keep(self, work: Any, tensor: Tensor) -> Any:
        self._messages.append((work, tensor))
        if len(self._messages) > MOST_UNDER_WAY:
            oldest, _ = self._messages.popleft()
            oldest.wait()
        return work
