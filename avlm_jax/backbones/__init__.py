"""Trains the demo's stand-ins for released backbones: a tiny SigLIP, BEATs and Qwen2 (`avlm demo --make-backbones`)."""
