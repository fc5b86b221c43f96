"""The data set on disk or in an object store: shards, index, manifest."""
