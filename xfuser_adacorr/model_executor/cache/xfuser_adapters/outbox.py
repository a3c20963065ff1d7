"""Messages under way: gloo loses one whose handle, or memory, is let go before it is delivered."""

from collections import deque
from typing import Any

from torch import Tensor

MOST_UNDER_WAY = 128


class Message:
    """A message that may be waited for more than once, which gloo's own handle would not bear."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._under_way: tuple[Any, Tensor] | None = (work, tensor)

    def wait(self) -> None:
        if self._under_way is not None:
            work, _ = self._under_way
            work.wait()
            self._under_way = None


class Outbox:
    """Keeps what was sent without waiting; beyond `MOST_UNDER_WAY` the oldest is waited for."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def keep(self, work: Any, tensor: Tensor) -> Message:
        message = Message(work, tensor)
        self._messages.append(message)
        if len(self._messages) > MOST_UNDER_WAY:
            self._messages.popleft().wait()
        return message


def outbox_of(group: Any) -> Outbox:
    """The outbox of one of xfuser's groups, which outlives a run, its errors and its cache."""
    return group.__dict__.setdefault("_outbox", Outbox())
