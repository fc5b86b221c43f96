"""The image files that `metagmvae classify` reads, and the rows that it writes."""
