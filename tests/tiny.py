"""A tiny FLUX transformer, its forward pass written out, and the sampling loop around it."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

TEXT_TOKENS = 6
GRID = 4


def make_tiny_flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval()


class FluxSampler:
    """Samples with a transformer the way ``FluxPipeline`` does, from seeded noise."""

    def __init__(self, transformer, scheduler=None):
        self.transformer = transformer
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=1.5)
        generator = torch.Generator().manual_seed(1)
        self.text = {
            "cond": torch.randn(1, TEXT_TOKENS, 16, generator=generator),
            "uncond": torch.randn(1, TEXT_TOKENS, 16, generator=generator),
        }
        self.pooled = torch.randn(1, 16, generator=generator)

    def inputs(self, x, t, branch="cond"):
        grid = int(x.shape[1] ** 0.5)
        ids = torch.zeros(grid * grid, 3)
        ids[:, 1] = torch.arange(grid * grid) // grid
        ids[:, 2] = torch.arange(grid * grid) % grid
        return {
            "hidden_states": x,
            "timestep": torch.as_tensor(t).expand(x.shape[0]) / 1000,
            "encoder_hidden_states": self.text[branch].expand(x.shape[0], -1, -1).to(x.dtype),
            "pooled_projections": self.pooled.expand(x.shape[0], -1).to(x.dtype),
            "img_ids": ids,
            "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        }

    def noise(self, seed=0, grid=GRID, batch=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, grid * grid, 8, generator=generator)

    def run(
        self,
        steps=20,
        *,
        seed=0,
        guidance=None,
        grid=GRID,
        batch=1,
        stop_after=None,
        finish=True,
        extra=None,
    ):
        """Sample; ``guidance`` adds the ``uncond`` call, ``stop_after`` cancels the run."""
        x = self.noise(seed, grid, batch)
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(0)
        for i, t in enumerate(self.scheduler.timesteps):
            if i == stop_after:
                return x
            v = self.call(x, t, "cond", **(extra or {}))
            if guidance is not None:
                uncond = self.call(x, t, "uncond", **(extra or {}))
                v = uncond + guidance * (v - uncond)
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        if finish:
            self.transformer._reset_stateful_cache()
        return x

    def call(self, x, t, branch="cond", **extra):
        with self.transformer.cache_context(branch):
            return self.transformer(**self.inputs(x, t, branch), **extra, return_dict=False)[0]


class LinearInSigma(torch.nn.Module):
    """Stands in for a transformer's forward: the output is linear in sigma, whatever the input."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a, self.b = torch.randn(2, 1, 16, 8, generator=generator, dtype=torch.float64)

    def forward(self, hidden_states, timestep, return_dict=True, **kwargs):
        out = self.a + self.b * timestep.double().view(-1, 1, 1)
        return (out.to(hidden_states.dtype),)


def all_blocks(model):
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def embed(model, inputs):
    """Everything before the first block: (hidden, encoder, keyword arguments of the blocks)."""
    temb = model.time_text_embed(inputs["timestep"] * 1000, inputs["pooled_projections"])
    rope = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    hidden = model.x_embedder(inputs["hidden_states"])
    encoder = model.context_embedder(inputs["encoder_hidden_states"])
    return hidden, encoder, {"temb": temb, "image_rotary_emb": rope}


def head(model, hidden, shared):
    return model.proj_out(model.norm_out(hidden, shared["temb"]))


def run_blocks(blocks, hidden, encoder, shared):
    for block in blocks:
        encoder, hidden = block(hidden, encoder, **shared)
    return hidden, encoder


def euler(sampler, velocity, steps=20, seed=0):
    """Sample with ``velocity(x, inputs, index, last)`` in place of the transformer."""
    x = sampler.noise(seed)
    sampler.scheduler.set_timesteps(steps)
    sampler.scheduler.set_begin_index(0)
    for i, t in enumerate(sampler.scheduler.timesteps):
        v = velocity(sampler.inputs(x, t), i, i == steps - 1)
        x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
    return x
