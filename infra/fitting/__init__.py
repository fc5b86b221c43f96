"""From a folder of pictures to a classifier and a report: `metagmvae fit`."""
