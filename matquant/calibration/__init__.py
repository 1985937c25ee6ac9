"""What a calibration text tells about a layer's inputs."""
