"""The training loop: progressive evaluation, cuts, checkpoints, publishing."""
