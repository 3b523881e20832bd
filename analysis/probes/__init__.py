"""Label-based probes behind one interface: fit on features, predict, score."""
