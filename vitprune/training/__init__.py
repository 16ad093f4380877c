"""Recipe, objective, and the loop that distils a dense model into its sparse copy."""
