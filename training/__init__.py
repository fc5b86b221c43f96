"""Training Meta-GMVAE and contrastive encoders."""
