"""Frozen multi-step teachers: one protocol, one adapter per family of diffusers classes, one ODE loop."""
