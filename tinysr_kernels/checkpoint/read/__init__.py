"""From bytes to checked tensors: headers, shards, pickles, paths."""
