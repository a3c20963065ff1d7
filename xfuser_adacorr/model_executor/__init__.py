"""Running models: caching and correction of transformer calls."""
