"""AdaCorrection over pipeline stages: offsets where latents enter, outputs where they leave.

The first stage is given the latents: it estimates offsets and decides. The last one has the
output: it forecasts, compensates, and tells the first what its refreshes found. Stages between
keep nothing.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord

from .adacorrection import AdaCorrection, History, Score

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.xfuser_adapters.pipefusion import PipelineStage


class StagedCorrection(AdaCorrection):
    """This stage's part of the correction; ``channels`` are those of the latents."""

    def __init__(self, stage: "PipelineStage", channels: int, **options: Any) -> None:
        super().__init__(**options)
        self.stage = stage
        self.channels = channels

    def unread(self, history: History) -> list[Tensor]:
        """On the first stage: what the last one found at this patch's last refresh."""
        if history.found_by is None:
            return []
        found = self.stage.receive_found(history.found_by)
        history.found_by = None
        return [*(torch.tensor(x) for x in found), history.latents.square().sum()]

    def forced(self, step: Step) -> str | None:
        """Patches begin with histories of their own, so what is owed is paid before."""
        return "patches" if self.stage.ends_warmup(step) else None

    def reuse(
        self,
        history: History,
        given: Tensor,
        step: Step,
        score: Score | None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return the forecast on the last stage; the others pass on what their forward returns."""
        if self.stage.is_first:
            history.accumulated_error = score.accumulated_error
        return self.forecast(history, given, step, dtype) if self.stage.is_last else None

    def refresh(
        self,
        history: History,
        latents: Tensor,
        given: Tensor,
        output: Tensor,
        step: Step,
        score: Score | None,
        record: CallRecord,
    ) -> Tensor:
        """Return the output, on the last stage compensated for skipped calls."""
        is_over = step.remaining == 1  # nobody asks what the last refresh found
        if self.stage.is_first:
            self.take_latents(history, latents, score, record)
            history.found_by = None if is_over else self.stage.ticket
        if not self.stage.is_last:
            return output
        result, found = self.take_output(history, given, output, step, self.channels)
        if not is_over:
            self.stage.send_found(torch.stack(found).tolist())
        return result
