"""Code that the three SAGAN programs share, without a framework: data, files, pictures, the loop and a quality measure."""
