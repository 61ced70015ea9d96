"""Geometric probes of neural-network training: round trip, 2-form, energy drift, certificate."""
