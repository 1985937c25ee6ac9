"""From a model's weights and a calibration text to codes: the solvers (tensors to tensors) and the driver over a model."""
