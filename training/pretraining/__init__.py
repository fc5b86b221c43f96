"""Pre-training of the encoder: one file a method, each a step module and the networks trained with the encoder."""
