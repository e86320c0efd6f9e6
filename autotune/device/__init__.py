"""The device that the search asks: a GPU in a worker process, compilation, correctness."""
