"""What the model computes, in torch: the definition that the fast versions in epmoe/kernels are compared with."""
