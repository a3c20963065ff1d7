"""The state of generations, one after the other: how it is made, kept apart, and forgotten."""

import logging
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import MAX_REDUCED_SUMS, DecisionScope

from .clock import SchedulerClock, Step, TimestepClock
from .context import Branch, CacheSummary, Generation, Trace, layout_of
from .correction import make_correction
from .correction.compensation import Compensation
from .diffusers_adapters.registry import ModelFamily, config_of
from .methods import REPLAY, make_method
from .target_calibration import load_target_calibration
from .xfuser_adapters.pipefusion import FOLLOWED_METHODS, Follower, PipelineStage

DEFAULT_CONTEXT = "default"

logger = logging.getLogger(__name__)


class Generations:
    """What one enabled transformer decides and corrects with, and the state of its generation."""

    def __init__(
        self,
        transformer: nn.Module,
        family: ModelFamily,
        config: CacheConfig,
        clock: SchedulerClock | TimestepClock,
        scope: DecisionScope,
        stage: PipelineStage | None = None,
        replayed: Trace | None = None,
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.config = config
        """Of the traced run where one is ``replayed``."""
        self.name = config.name if replayed is None else REPLAY
        self.clock = clock
        self.scope = scope
        self.stage = stage
        """Place in a pipeline of stages; None: this rank runs all blocks."""
        self.method = make_method(config, family, transformer, replayed)
        self.method.max_sums = MAX_REDUCED_SUMS if scope.is_parallel else None
        self.corrections: list[Any] = []
        """Made for every generation, since the pipeline's scheduler may change: one for the whole
        batch, or one a sample."""
        self.forecasts = config.forecasts_output
        self.led = stage is not None and (self.forecasts or config.use_cache in FOLLOWED_METHODS)
        """The first pipeline stage decides for all."""
        if self.led and not stage.is_first:
            self.method = Follower(self.method)
        self.literal = config.enable_adacorrection and config.adacorr_mode == "literal"
        self.measures = self.forecasts and not self.method.decides_alone
        self.calibration = load_target_calibration(transformer, config) if self.measures else None
        self.decides_outside = (
            self.forecasts
            and stage is None
            and (self.method.decides_alone or config.use_cache == "Auto")
        )
        """The decision needs nothing from inside the transformer, and nor does what stands in."""
        self.context_name = DEFAULT_CONTEXT
        self.generation: Generation | None = None
        self.finished: Generation | None = None

    @contextmanager
    def context(self, name: str):
        """Names the branch of the calls made inside, as ``CacheMixin.cache_context`` does."""
        outer, self.context_name = self.context_name, name
        try:
            yield
        finally:
            self.context_name = outer

    def reset(self) -> None:
        """End the generation: forget all tensors, keep its trace for `summary`."""
        if self.generation is None:
            return
        # Ranks may leave a generation at different times, so nothing is reduced here.
        if not self.scope.latents_are_split:
            branches = [b for b in self.generation.branches.values() if b.correction is not None]
            unread = {i: branch.correction_state.unread for i, branch in enumerate(branches)}
            for i, found in self.scope.read_groups(unread, reduced=()).items():
                self._learn(branches[i], found)
        self._close()

    def _close(self) -> None:
        for correction in self.corrections if self.forecasts else []:
            correction.compensation.release()
        if self.generation is not None:
            self.generation.forget()
            self.finished, self.generation = self.generation, None

    def summary(self) -> CacheSummary:
        """Summary of the running generation, or of the last one."""
        generation = self.generation or self.finished or Generation(self._new_trace())
        return generation.summary()

    def _begin_generation(self) -> None:
        self.reset()
        self.generation = Generation(self._new_trace())
        self.corrections = self._new_corrections()
        self.method.begin_generation(self.clock)

    def _new_corrections(self) -> list[Any]:
        return [self._new_correction()]

    def _new_correction(self, compensation: Compensation | None = None) -> Any:
        in_stage = self.stage is not None
        return make_correction(
            self.config,
            self.family,
            self.clock,
            scope=self.scope,
            compensation=compensation,
            measures=self.measures,
            calibration=self.calibration,
            stage=self.stage,
            latent_channels=config_of(self.transformer)["in_channels"] if in_stage else None,
        )

    def _new_trace(self) -> Trace:
        return Trace(self.name, config=self.config.to_dict())

    def _branches(self, latents: Tensor) -> list[Branch]:
        """The states of this call's branch (of each sample), empty where none can be continued."""
        layout, name, known = layout_of(latents), self._branch_name(), []
        if self.generation is not None:
            known = [b for b in self.generation.branches.values() if b.name == name]
        changed = any(branch.layout != layout for branch in known)
        if self.clock.run_began() or self.generation is None or changed:
            self._begin_generation()
            known = []
        return known

    def _branch_name(self) -> str:
        return self.context_name + (self.stage.patch if self.stage is not None else "")

    def _new_branch(self, layout: tuple, sample: int | None = None) -> Branch:
        name, correction = self._branch_name(), self.corrections[sample or 0]
        history = correction.new_state() if correction else None
        state = self.method.new_branch_state(name)
        branch = Branch(name, layout, state, correction, history, sample)
        self.generation.branches[name, sample] = branch
        return branch

    def _begin_unannounced(self, last: Step, step: Step) -> None:
        """A new run began: nothing of the one up to ``last`` may be used."""
        if not step.exact and step.sigma == last.sigma and last.index > 0:
            logger.warning(
                "step %d has the noise level of the call before, %.6g, and is taken for the start "
                "of a new run; if the timesteps are rounded (bfloat16), give the scheduler",
                step.index,
                step.sigma,
            )
        self._begin_generation()

    @staticmethod
    def _learn(branch: Branch, found: list[float]) -> None:
        if found:
            branch.correction.learn(branch.correction_state, found)
