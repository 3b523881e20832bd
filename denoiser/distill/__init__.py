"""Stage three: a backbone's own tokens become clean."""
