"""What one sees of a run: metrics, throughput, plot, profile, and the record of every start."""
