"""Shared code of generated corpora: counter-based random numbers, Zipf distributions, documents."""
