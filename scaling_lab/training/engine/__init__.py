"""The optimization step: gradient, optimizer, compiled libraries, CUDA graphs, devices and their memory."""
