"""Instruments that measure what a compressed cache does to a model's output."""
