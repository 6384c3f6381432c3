"""What a user of plain PyTorch (or Ray) would write: training scripts, and parameter servers."""
