"""The experts' products in Triton, straight from packed MXFP4."""
