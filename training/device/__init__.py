"""Ranks, precision, memory allocator and random numbers."""
