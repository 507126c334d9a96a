"""Approach 2 (Hoffmann et al. 2022): the minimum of each IsoFLOP valley."""
