"""The dataset on disk or in an object store: shards, index, manifest."""
