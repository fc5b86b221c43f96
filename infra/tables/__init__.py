"""`metagmvae table 1|2|10 --run`: trains and evaluates the rows of the paper's tables that have no result yet."""
