"""Small trained pipelines and the procedural pictures that they are trained on."""
