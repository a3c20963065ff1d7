"""The blend of cached and fresh outputs that skipped steps should have used, known afterwards."""

LONGEST_BEND = 4.0
"""Gap over the gap before, from which on the refresh before the last would bend the blend by more
than it knows."""

BlendWeights = tuple[float, float, float]
"""``(b0, b1, b)`` of ``b0 V0 + b1 V1 + b v``: the last two refreshes before the skipped steps, and
the one after them."""


def line_blend(t: float, t_fresh: float, t0: float, t1: float | None) -> BlendWeights:
    """``(1 - w) V0 + w v`` at the coordinate ``t``, ``w = (t0 - t) / (t0 - t_fresh)`` in [0, 1].

    V0 was computed at ``t0``, V1 at ``t1`` (None: there was none), v at ``t_fresh``.
    """
    w = (t0 - t) / (t0 - t_fresh) if t0 != t_fresh else 1.0
    return 1.0 - w, 0.0, w


def parabola_blend(t: float, t_fresh: float, t0: float, t1: float | None) -> BlendWeights:
    """The parabola through all three, while the gap is below `LONGEST_BEND` times the one before.

    For multistep samplers, which take derivatives of the outputs: lines have a kink at a refresh.
    """
    if t1 is None or t0 == t_fresh or abs(t_fresh - t0) >= LONGEST_BEND * abs(t0 - t1):
        return line_blend(t, t_fresh, t0, t1)
    b0 = (t - t1) * (t - t_fresh) / ((t0 - t1) * (t0 - t_fresh))
    b1 = (t - t0) * (t - t_fresh) / ((t1 - t0) * (t1 - t_fresh))
    return b0, b1, 1.0 - b0 - b1
