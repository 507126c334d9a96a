"""Approach 1 (Hoffmann et al. 2022): the lower envelope of the training curves."""
