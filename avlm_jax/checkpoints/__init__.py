"""What training keeps on disk: steps to continue from, and a stage's result; hashed when written, verified when read."""
