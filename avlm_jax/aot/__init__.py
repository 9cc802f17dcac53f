"""Ahead-of-time compilation of the training step for TPU slices nobody has rented yet; `avlm preflight` is its verb.

topologies (which slice) -> compiled (the step's programs, their memory) -> hlo (collectives, traffic) -> roofline (seconds)
-> report and search; slices is the table for the documentation.
"""
