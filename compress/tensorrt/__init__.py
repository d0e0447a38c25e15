"""TensorRT: the graphs that it is given, and the folder that builds an engine of them on the target."""
