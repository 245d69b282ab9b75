"""One trainable stage per file: a task wires maths, model, data and reward together."""
