"""Cached runs of tiny models, and what their traces say."""

from xfuser_adacorr import cache_summary, disable_cache, enable_cache


def run_cached(sampler, method, *, bare=False, steps=20, **kwargs):
    """(latents, summary) of a run; ``bare``: without telling the cache of the scheduler."""
    enable_cache(sampler.transformer, method, scheduler=None if bare else sampler.scheduler)
    try:
        x = sampler.run(steps, **kwargs)
        return x, cache_summary(sampler.transformer)
    finally:
        disable_cache(sampler.transformer)


def refreshed(summary):
    """Of every record, whether all was computed."""
    return [call.refreshed for call in summary.trace.calls]


def computed(summary, context=None):
    """Steps that were computed, of the records of one context if it is given."""
    calls = summary.trace.calls
    return [
        call.step_index
        for call in calls
        if call.refreshed and (context is None or call.context == context)
    ]


def reads_per_call(sampler, host_reads, steps=12):
    """Host reads within each transformer call of a run, without those of the scheduler's steps."""
    counts = []
    x = sampler.noise()
    sampler.scheduler.set_timesteps(steps)
    for t in sampler.scheduler.timesteps:
        host_reads.clear()
        v = sampler.call(x, t)
        counts.append(len(host_reads))
        x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
    return counts
