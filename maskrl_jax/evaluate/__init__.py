"""Measurement: quality-versus-calls curves, Frechet distance, bootstrap bounds, timing, figures, report."""
