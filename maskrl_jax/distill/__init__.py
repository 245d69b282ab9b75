"""Distillation: a network learns what another one does at greater cost. Pure: arrays in, arrays out."""
