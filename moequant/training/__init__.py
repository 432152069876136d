"""Forward and backward of a layer: dispatch, the experts' products and combine, for autograd."""
