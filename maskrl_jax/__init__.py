"""Train, accelerate and reward-tune masked image generators.

Axis letters, used in names and shapes everywhere: B batch, P prompts, G group, T steps, N image tokens,
K codes (critical steps where said), D width, H heads, L text length.
"""
