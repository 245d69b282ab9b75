"""One runnable stage per file; `get_config(arg)` gives its config, `arg` a size or a variant."""
