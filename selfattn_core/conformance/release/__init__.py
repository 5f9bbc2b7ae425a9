"""What only a maintainer runs: golden vectors and the calibration of the limits."""
