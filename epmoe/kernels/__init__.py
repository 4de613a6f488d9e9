"""What is fast, in Triton: the functions of epmoe/layers under the same names."""
