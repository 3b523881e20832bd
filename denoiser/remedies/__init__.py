"""Make denoisers without training: from a few images, from noise images, or from the weights alone."""
