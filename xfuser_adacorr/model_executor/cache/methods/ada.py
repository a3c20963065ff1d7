"""AdaCache: how fast one residual in the middle of the stack changes sets the next refresh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.config import RELATIVE, CacheConfig
from xfuser_adacorr.core.codebook import Codebook, nearest_published_steps, published_codebook
from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.core.signals import (
    clip_motion_sums,
    l1_sums,
    motion_sums,
    ratio,
    root_ratio,
)
from xfuser_adacorr.model_executor.cache.calibration import load_ada_calibration
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import ModelFamily

from .base import BaseMethod, BlockCall, Signal, Streams, Verdict

DEFAULT_CODEBOOK = "fast"
DEFAULT_SCALE = 1.0
FORCED_LAST_CALLS = 2

MOREG_WINDOWS = {30: (4, 26), 100: (10, 90)}
"""Sampling steps -> first and last step, counted from 1, whose motion is taken into account."""
MOREG_CENTRE = 0.385
MOREG_POWER = 8
MOREG_GRADIENT = 10.0


@dataclass(slots=True)
class AdaState:
    reference: Tensor | None = None
    """Signal of the last computed call ``[B, N, D]``."""
    residual: Tensor | None = None
    """Stack output minus stack input of the last computed call ``[B, N, D]``."""
    stack_input: Tensor | None = None
    unread: list[Tensor] = field(default_factory=list)
    """Sums that the last computed call measured, to be read with the next decision."""
    step: Step | None = None
    """Place of the running call."""
    computed: int | None = None
    """Index of the last computed step."""
    gap: int = 1
    """k: steps from the computed call before it to the last one."""
    rate: int = 1
    change: float | None = None
    """c, once two calls have been compared."""
    motion: float = 1.0
    """m of the last computed call."""


class Ada(BaseMethod):
    """Compute again ``rate`` steps after a computed call, by how fast a residual p changes there.

    ``c = |p_old - p| / |p_old| / k`` (sums of magnitudes) on computed calls alone, with k steps
    between them; the codebook's first threshold above c (times ``rel_l1_thresh``, default 1) gives
    the rate. p is the gated residual of self-attention of the middle block (`BlockList`), or where
    a family does not describe one the whole residual of the middle block. The first two and the
    last two calls are computed. A reused call returns ``h + R`` with the whole stack's residual:
    the publication adds two residuals a block, all from the same call and none changed on the way,
    which is the same sum. Source: Kahatapitiya et al., AdaCache (arXiv 2411.02397).

    With ``moreg`` (Motion Regularization), ``c := c * (m + |10 (m - m_prev) / k|)`` where
    ``m = (sum |p[1:] - p[:-1]| / sum (|p[1:]| + |p[:-1]|) / 0.385)^8 / moreg_divisor`` over frames
    in the middle of the run and 1 outside of it. With ``moreg="relative"``, ``c := c * m`` there
    instead, where m is the motion of the clip that the call predicts (latents and output together),
    ``|x0[1:] - x0[:-1]| / sqrt(|x0[1:]|^2 + |x0[:-1]|^2)`` (norms), over its mean in the model's
    other runs at this place.

    Raises `ValueError` for ``moreg`` on models of images, for the relative one without a
    calibration of the motion, for a codebook that is not published, and on the first call if the
    number of steps is needed and not known.
    """

    def __init__(
        self, config: CacheConfig, family: ModelFamily, transformer: nn.Module, *, signal_only: bool
    ) -> None:
        self.family = family
        self.signal_only = signal_only
        self.scale = config.rel_l1_thresh
        if self.scale is None:
            self.scale = family.default_threshold(config)
        if self.scale is None:
            self.scale = DEFAULT_SCALE
        self.num_steps = config.num_steps
        self.moreg = config.moreg
        self.moreg_divisor = config.moreg_divisor
        framed = family.predicted_clip if self.moreg == RELATIVE else family.num_frames
        if self.moreg and framed is None:
            raise ValueError(
                f"moreg must be False for {type(transformer).__name__}: it measures motion from "
                f"frame to frame, and family {family.name!r} describes no frames"
            )
        self.codebook_name, self.codebook, self.mean_motion = self._told(config, transformer)
        self.observe: Callable[[float, float, float | None], None] | None = None
        """Is told what computed calls measure: the share of the run up to there, c without MoReg,
        and the predicted clip's motion where there are frames."""
        if self.codebook is None and self.num_steps is not None:
            published_codebook(self.codebook_name, self.num_steps)  # raises before the first call
        described = [
            (block, block_list.attention_residual)
            for block_list in family.block_lists
            if block_list.attention_residual is not None
            for block in getattr(transformer, block_list.attribute)
        ]
        middle = (len(described) - 1) // 2
        self.signal_block, self.attention_residual = described[middle] if described else (None,) * 2

    @staticmethod
    def _told(
        config: CacheConfig, transformer: nn.Module
    ) -> tuple[str | None, Codebook | None, Profile | None]:
        """A published codebook's name, or the codebook given or calibrated; and the mean motion."""
        calibrated = None
        if config.codebook is None or config.moreg == RELATIVE:
            calibrated = load_ada_calibration(transformer, config.calibration)
        motion = calibrated and calibrated.motion
        if config.moreg == RELATIVE and motion is None:
            raise ValueError(
                f"moreg={RELATIVE!r} needs the mean motion of the model: make a calibration of its "
                "clips with scripts/calibrate_ada.py, or leave moreg at False"
            )
        if isinstance(config.codebook, str):
            return config.codebook, None, motion
        if config.codebook is not None:
            return None, Codebook(config.codebook), motion
        if calibrated is None:
            return DEFAULT_CODEBOOK, None, motion
        return None, calibrated.codebook, motion

    def new_state(self) -> AdaState:
        return AdaState()

    def begin_call(self, state: AdaState, step: Step) -> None:
        needed = self.codebook is None or self.moreg
        if needed and not step.exact and self.num_steps is None:
            raise ValueError(
                "num_steps must be given for Ada on a transformer without its scheduler: its "
                "published codebooks and MoReg depend on it (or give the scheduler, or a codebook "
                "of thresholds and rates without moreg)"
            )
        state.step = step

    def probe(self, state: AdaState, call: BlockCall) -> Signal:
        return Signal(state.unread)

    def verdict(self, state: AdaState, sums: list[float], local: list[float]) -> Verdict:
        step, total = state.step, state.step.index + state.step.remaining
        if sums:
            codebook = self.codebook or published_codebook(self.codebook_name, total)
            state.change = self._change(state, sums, total)
            state.rate = codebook.rate(state.change, self.scale)
            state.unread = []
        due = step.index >= state.computed + state.rate
        return Verdict(not due and step.remaining > FORCED_LAST_CALLS, state.change)

    def _change(self, state: AdaState, sums: list[float], total: int) -> float:
        """c of the last computed call, with MoReg's factor where it is on."""
        change, done = ratio(*sums[:2]) / state.gap, state.computed + 1
        if self.observe is not None:
            self.observe(done / total, change, root_ratio(*sums[2:]) if sums[2:] else None)
        if not self.moreg:
            return change
        steps = nearest_published_steps(total)
        first, last = MOREG_WINDOWS[steps]
        within = first * total <= done * steps <= last * total
        if self.moreg == RELATIVE:
            motion = root_ratio(*sums[2:])
            return change * motion / self.mean_motion(done / total) if within else change
        motion = ratio(*sums[2:])
        factor = (motion / MOREG_CENTRE) ** MOREG_POWER / self.moreg_divisor if within else 1.0
        gradient = MOREG_GRADIENT * (factor - state.motion) / state.gap
        state.motion = factor
        return change * (factor + abs(gradient))

    def settle(self, state: AdaState, verdict: Verdict | None, refreshed: bool) -> None:
        if refreshed:
            if state.computed is not None:
                state.gap = state.step.index - state.computed
            state.computed = state.step.index

    def run_block(self, state: AdaState, call: BlockCall, verdict: Verdict | None) -> Streams:
        stream = self.family.output_stream
        if call.is_first:
            state.stack_input = call.streams[stream]
        out = call.run() if verdict is None else call.streams
        if verdict is None and self._is_signal_block(call):
            self._measure(state, call, out)
        if call.is_last:
            if verdict is not None:
                out = {**out, stream: state.stack_input + state.residual}
            elif not self.signal_only:
                state.residual = out[stream] - state.stack_input
            state.stack_input = None
        return out

    def _is_signal_block(self, call: BlockCall) -> bool:
        if self.signal_block is not None:
            return call.block is self.signal_block
        return call.index == (call.count - 1) // 2

    def _measure(self, state: AdaState, call: BlockCall, out: Streams) -> None:
        """Compare the signal with that of the computed call before; nothing is read here."""
        if self.attention_residual is not None:
            current = self.attention_residual(call.block, call.arguments)
        else:
            stream = self.family.output_stream
            current = out[stream] - call.streams[stream]
        num_frames = self.family.num_frames(call.arguments) if self.moreg else None
        if num_frames == 1:
            raise ValueError("moreg must be False for a single frame: it measures motion")
        if state.reference is not None:
            state.unread = l1_sums(current, state.reference)
            if self.moreg is True:
                state.unread += motion_sums(current, num_frames)
        state.reference = current

    @property
    def reads_output(self) -> bool:
        observed = self.observe is not None and self.family.predicted_clip is not None
        return observed or self.moreg == RELATIVE

    def note_output(self, state: AdaState, arguments: Mapping[str, Any], output: Tensor) -> None:
        """Measure the predicted clip's motion; nothing is read here."""
        clip = self.family.predicted_clip(arguments, output, state.step.sigma)
        if state.unread and clip.shape[2] > 1:
            state.unread += clip_motion_sums(clip)
