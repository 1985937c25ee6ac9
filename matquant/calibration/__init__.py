"""Activations of a calibration text: hidden states of several slices, and second moments of layer inputs."""
