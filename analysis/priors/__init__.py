"""Generative priors on features: what can be generated from the tokens shows what they hold."""
