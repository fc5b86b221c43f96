"""One module per group of `metagmvae` sub-commands: parse, call, print."""
