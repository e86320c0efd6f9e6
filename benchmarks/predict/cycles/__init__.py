"""A cycle model of one streaming multiprocessor that replays the traces of executed programs."""
