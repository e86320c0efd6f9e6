"""Images and videos on disk: jobs, batches, decoding, encoding, resuming, reports."""
