"""Methods, a file each: options, rule, and what stands in."""
