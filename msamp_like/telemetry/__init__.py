"""What a run records about its numerics, and the figures and pages made of it."""
