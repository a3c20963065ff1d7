"""What the cache knows of xfuser, the engine for several devices. Nothing here imports it early."""
