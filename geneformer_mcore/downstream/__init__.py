"""What is done with a run or a trained model: report, embed, classify, perturb (floor 9)."""
