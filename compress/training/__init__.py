"""Training a speaker-embedding network from a data folder."""
