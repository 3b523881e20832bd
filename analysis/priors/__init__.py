"""Train generative priors on features: pictures generated from tokens show which information the tokens hold."""
