"""Where reuse happens: around a sampler step, a model's call, or inside its stack of blocks."""
