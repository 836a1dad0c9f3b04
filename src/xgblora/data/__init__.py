"""Examples and batches: what every other room passes around."""
