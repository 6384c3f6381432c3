"""Training scripts as a user of plain PyTorch would write them, one per way of distributing."""
