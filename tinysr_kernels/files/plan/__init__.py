"""What a run reads and writes: inputs found, recognized and told apart, outputs named, results on record."""
