"""One host read a call at the most, and none inside blocks."""

import pytest

from tests.cached import reads_per_call
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import CacheConfig, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of

BASES = ["Fb", "Tea", "Fast", "Ada"]
NAMES = [*BASES, "Auto", *(f"{base}+AdaCorrection" for base in BASES)]


def config_of(name):
    options = {} if name == "Auto" else {"rel_l1_thresh": 0.2}
    if name.startswith("Ada"):
        options = {"codebook": {0.05: 3, 0.5: 2}}
    return CacheConfig.from_name(name, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [False, True])
def test_at_most_one_read_a_call(host_reads, name, bare):
    sampler = FluxSampler(make_tiny_flux())
    plain = reads_per_call(sampler, host_reads)
    config = config_of(name)
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    first = reads_per_call(sampler, host_reads)
    second = reads_per_call(sampler, host_reads)
    for before, after in zip(plain[1:], second[1:], strict=True):
        assert after - before <= 1
    # a new run: the schedule, what the last run left unread, and where it begins if nobody tells
    assert second[0] - plain[0] <= 3
    least = len(first) - 1
    if name == "Ada" and not bare:  # it reads what a computed call measured: one in 3 at least
        least = len(first) // 3
    assert sum(first) >= least


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [False, True])
def test_no_read_inside_blocks(host_reads, name, bare):
    """All reads of a call happen in the one place where decisions reach the host."""
    sampler = FluxSampler(make_tiny_flux())
    config = config_of(name)
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    site, inside = site_of(sampler.transformer), []
    stacks = [site.stack] if bare else list(site.stacks.values())

    def watch(method):
        run_block = method.run_block

        def watched(*args):
            before = len(host_reads)
            out = run_block(*args)
            inside.append(len(host_reads) - before)
            return out

        method.run_block = watched

    for stack in stacks:
        if stack is not None:
            watch(stack.method)
    reads_per_call(sampler, host_reads)
    assert name == "Auto" or inside
    assert not any(inside)
    disable_cache(sampler.transformer)


@pytest.mark.parametrize("name", NAMES)
def test_steps_read_no_more_than_without_a_cache(host_reads, name):
    """What happens in the scheduler's step, the repair among it, stays on the device."""
    sampler = FluxSampler(make_tiny_flux())
    counts = []
    step = sampler.scheduler.step

    def counted(*args, **kwargs):
        before = len(host_reads)
        out = step(*args, **kwargs)
        counts.append(len(host_reads) - before)
        return out

    def run():
        counts.clear()
        x = sampler.noise()
        sampler.scheduler.set_timesteps(12)
        sampler.scheduler.set_begin_index(0)
        for t in sampler.scheduler.timesteps:
            x = counted(sampler.call(x, t), t, x, return_dict=False)[0]
        return list(counts)

    plain = run()
    enable_cache(sampler.transformer, config_of(name), scheduler=sampler.scheduler)
    step = sampler.scheduler.step
    run()
    assert run() == plain
