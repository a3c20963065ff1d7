"""A rank that fails within a cached call, while the other one waits for it to decide."""

import torch

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import DecisionScope, enable_cache

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
sampler = FluxSampler(make_tiny_flux())
scope = DecisionScope(torch.distributed.group.WORLD)
enable_cache(
    sampler.transformer, "Tea", rel_l1_thresh=0.2, scope=scope, scheduler=sampler.scheduler
)
if torch.distributed.get_rank() == 1:

    def fail(*_):
        raise ValueError("rank 1 has run out of luck")

    sampler.transformer.time_text_embed.register_forward_hook(fail)
print("both are running", flush=True)
with torch.no_grad():
    sampler.run()
