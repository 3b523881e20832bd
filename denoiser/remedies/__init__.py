"""Remedies that need no training: found from a few images, from noise images, or from the weights alone."""
