"""The device under tuning: a GPU in a worker process, ahead-of-time compilation, correctness checks."""
