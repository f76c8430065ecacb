"""A trained model at work: embed, evaluate, predict (floor 11)."""
