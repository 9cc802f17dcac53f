"""Offline preparation and online loading of audio-visual records; knows nothing of any model."""
