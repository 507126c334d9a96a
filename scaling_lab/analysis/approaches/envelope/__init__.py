"""Approach 1 of Hoffmann et al. 2022: the lower envelope of the training curves."""
