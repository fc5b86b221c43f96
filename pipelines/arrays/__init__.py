"""Images from Python: arrays, and objects of other libraries."""
