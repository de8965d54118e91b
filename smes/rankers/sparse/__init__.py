"""SMES, the sparse mixture of experts with progressive routing (arXiv 2602.09386), and our variants of it."""
