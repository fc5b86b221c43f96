"""EM, ELBO and NT-Xent as plain functions."""
