"""Networks: encoders, decoders, set attention, Meta-GMVAE."""
