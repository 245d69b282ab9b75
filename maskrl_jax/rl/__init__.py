"""Maths of the reinforcement learning methods. Pure: arrays in, arrays out."""
