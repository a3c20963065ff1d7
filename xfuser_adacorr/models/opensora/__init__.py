"""Open-Sora 1.2: its transformer, sampler and pipeline, and how its tokens are split over ranks."""
