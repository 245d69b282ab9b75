"""Masked sampling: schedules, token draws and the decode loops. Pure: arrays in, arrays out."""
