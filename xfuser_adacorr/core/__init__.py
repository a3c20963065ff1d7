"""Pure tensor maths of caching and correction; knows no models, hooks or pipelines."""
