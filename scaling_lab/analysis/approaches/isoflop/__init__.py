"""Approach 2 of Hoffmann et al. 2022: the minimum of each IsoFLOP valley."""
