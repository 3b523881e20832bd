"""One image: its features as a semantic field, an artifact and a residual."""
