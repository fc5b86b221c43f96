"""Ray: connecting to a cluster, distributed training, parallel tasks."""
