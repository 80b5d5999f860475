"""A method and a layout for svdconvert."""
