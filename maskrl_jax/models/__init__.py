"""Linen modules, one family per file. Pure: arrays in, arrays out."""
