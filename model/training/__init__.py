"""Training: data sets to samples, samples to batches, batches to weights."""
